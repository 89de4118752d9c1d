"""Documents from files, datasets directories and the Hugging Face Hub, one at a time."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rorqual.data.text_pieces import rejoined
from rorqual.errors import UserError, file_error
from rorqual.extras import require
from rorqual.recipe import Source
from rorqual.unicode_checks import whole

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
SUFFIXES = (".txt", *RECORDS)
TXT_DOCUMENT = 1 << 15  # characters
READ = 1 << 16  # bytes at a time
PARQUET_ROWS = 256  # in memory at a time; a row may be a book


def read_texts(source: Source) -> Iterator[str]:
    """The documents of one source, in order; empty ones and nulls are left out.

    A .txt file is cut into documents of about 32 KB, at line ends, else at spaces, else anywhere, so that one large
    file, or line, can be streamed, tokenised in parallel and partly held out. Raises UserError, with file and line,
    for whatever cannot be read.
    """
    if _is_dataset(source.path):
        for number, record in enumerate(_rows(source), start=1):
            yield from _text(record, source.text_field, f"{source.path}, row {number}")
        return
    for path in find_files(source.path):
        if named(path, ".txt"):
            yield from rejoined(_read_txt(path), TXT_DOCUMENT)
        else:
            for where, record in read_records(path, source.text_field):
                yield from _text(record, source.text_field, where)


def find_files(pattern: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file or files that a path or glob names, sorted. What exists as it is written is taken so, brackets too.

    Raises UserError for those whose names end otherwise than in `suffixes`.
    """
    path = Path(pattern)
    try:
        if path.is_dir() and _is_dataset(str(path)):
            raise UserError(
                f"{pattern} is a saved dataset, which only pretrain reads; write it as a file, with the dataset's "
                "to_parquet, and give that"
            )
        if path.is_dir():
            raise UserError(f"{pattern} is a directory but not a saved dataset; name the files, e.g. {pattern}/*.jsonl")
        found = [path] if path.is_file() else _glob(path)
    except OSError as e:
        raise file_error(pattern, e, "looked up") from e
    if not found:
        raise UserError(f"{pattern} does not exist; check the path")
    for file in found:
        if not named(file, *suffixes):
            raise UserError(f"{file} is none of {', '.join(suffixes)}; convert or rename it")
    return found


def _glob(path: Path) -> list[Path]:
    literal, rest = Path(path.anchor), list(path.parts[1:] if path.anchor else path.parts)
    while rest and (literal / rest[0]).exists():
        literal /= rest.pop(0)
    before, pattern = glob.escape(str(literal)), str(Path(*rest))
    for way in (pattern, pattern.replace("[", "[[]")):
        if found := sorted(Path(p) for p in glob.glob(f"{before}/{way}", recursive=True) if Path(p).is_file()):
            return found
    return []


def named(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends so, in whatever case."""
    return path.name.lower().endswith(suffixes)


def read_records(path: Path, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs (place for error messages, record) from a .jsonl, .jsonl.gz or .parquet file.

    `column` limits what is read from Parquet.
    """
    if named(path, ".parquet"):
        yield from _read_parquet(path, column)
    elif named(path, ".jsonl", ".jsonl.gz"):
        yield from _read_jsonl(path)
    else:
        raise UserError(f"{path} is not .jsonl, .jsonl.gz or .parquet; convert it")


def describe(source: Source) -> list[Any]:
    """What identifies the contents of a source without reading them, for fingerprints (JSON-able)."""
    if _is_dataset(source.path):
        return [source.path, source.split, source.text_field, _open_dataset(source)._fingerprint]
    stats = [(str(path), path.stat()) for path in find_files(source.path)]
    return [source.text_field, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with _open(path) as file:
            for number, line in _lines(file):
                try:
                    record = _parse(line, path, number)
                except UserError:
                    while file.read(READ):  # to the end, where a damaged gzip file shows that it is
                        pass
                    raise
                yield f"{path}, line {number}", record
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(
            f"{path} cannot be read as gzip ({e}); it is damaged, cut short or no gzip file: fetch it again"
        ) from e
    except OSError as e:
        raise file_error(path, e, "read") from e


def _open(path: Path) -> BinaryIO:
    file = open(path, "rb")  # noqa: SIM115 (closed by the caller, or with the gzip file)
    packed = named(path, ".gz") or file.peek(2)[:2] == b"\x1f\x8b"
    return gzip.GzipFile(fileobj=file) if packed else file


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, whether they end with LF, CR LF or CR."""
    number = 0
    for line in file:
        for part in line.rstrip(b"\r\n").split(b"\r"):
            number += 1
            part = part.removeprefix(codecs.BOM_UTF8) if number == 1 else part
            if part and not part.isspace():
                yield number, part


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number} is not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {number} is not valid JSON ({e}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} holds a {type(record).__name__}, not a JSON object; mend the line")
    return record


def _text(record: dict[str, Any], field: str, where: str) -> Iterator[str]:
    if field not in record:
        raise UserError(f"{where} has no field {field!r} but {sorted(record)}; set text_field")
    text = record[field]
    if text is None:  # how tables say that a row has no text
        return
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds a {type(text).__name__}, not text; mend it or set text_field")
    if not whole(text):
        raise UserError(f"{where}: field {field!r} holds half a character (a lone surrogate); mend it")
    if text:
        yield text


def _read_txt(path: Path) -> Iterator[str]:
    """The text in parts, line ends as they are."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with open(path, "rb") as file:
            while raw := file.read(READ):
                yield decoder.decode(raw)
                line += raw.count(b"\n")
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        line += e.object.count(b"\n", 0, e.start)
        raise UserError(f"{path}, line {line} is not UTF-8 text ({e.reason}); convert the file") from None
    except OSError as e:
        raise file_error(path, e, "read") from e


def _read_parquet(path: Path, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    require("data", "pyarrow")
    from pyarrow import parquet

    number = 0
    try:
        # Buffered, so that a column's pages are read one after another and not as a whole.
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {column!r} but {file.schema_arrow.names}; set text_field")
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if column is None else [column]):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except UserError:
        raise
    except Exception as e:  # pyarrow raises its own kinds and Python's: OSError, ValueError, UnicodeDecodeError, …
        after = f" after row {number}" if number else ""
        raise UserError(f"{path} is not a readable Parquet file{after} ({_first_line(e)}); check the file") from e


def _is_dataset(path: str) -> bool:
    """Whether a path is a datasets directory (save_to_disk) or, not being on this disk, a name on the Hub."""
    here = Path(path)
    try:
        if here.is_dir():
            return (here / "state.json").is_file() or (here / "dataset_dict.json").is_file()
        on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.lower().endswith(SUFFIXES)
        return bool(on_hub) and not here.exists()
    except OSError:  # find_files says why
        return False


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    found = _open_dataset(source)
    number = 0
    try:
        for record in found:
            number += 1
            yield record
    except Exception as e:  # as above: the files are pyarrow's
        raise UserError(
            f"dataset {source.path} cannot be read after row {number} ({_first_line(e)}); restore it from its source"
        ) from e


def _open_dataset(source: Source) -> Any:
    require("data", "datasets")
    import datasets

    here = Path(source.path)
    try:
        if not here.is_dir():
            return datasets.load_dataset(source.path, split=source.split)
        found = datasets.load_from_disk(str(here))
    except Exception as e:  # the Hub client raises many kinds
        raise UserError(f"dataset {source.path} cannot be opened ({_first_line(e)}); check the name or path") from e
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise UserError(f"dataset {source.path} has no split {source.split!r} but {sorted(found)}; set split")
        found = found[source.split]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
