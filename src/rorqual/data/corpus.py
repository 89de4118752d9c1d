"""Stream documents from files, saved datasets and the Hugging Face Hub."""

import codecs
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from rorqual.data.text_pieces import split_stream
from rorqual.errors import UserError, file_error
from rorqual.extras import require
from rorqual.recipe import Source
from rorqual.strict_json import Json
from rorqual.unicode_checks import whole

if TYPE_CHECKING:
    import datasets

Record: TypeAlias = dict[str, object]  # of a JSON line, a Parquet row or a dataset's; then with dates, bytes, Decimal

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
TEXT = (".txt", ".md")
SUFFIXES = (*TEXT, *RECORDS)
TXT_DOCUMENT = 1 << 15  # characters
READ_BYTES = 1 << 16  # per read
PARQUET_ROWS = 256  # per batch in memory; a row may be a whole book


def read_texts(source: Source) -> Iterator[str]:
    """The documents of one source, in order, without empty ones and nulls.

    A .txt or .md file is split into documents of about 32 K characters, at line ends, else at spaces, else anywhere, so
    that a large file or line can be streamed, tokenised in parallel and partly held out. Raises UserError, with file
    and line, for what cannot be read.
    """
    if _is_dataset(source.path):
        for number, record in enumerate(_rows(source), start=1):
            yield from _text(record, source.text_field, f"{source.path}, row {number}")
        return
    for path in find_files(source.path):
        if named(path, *TEXT):
            yield from split_stream(_read_txt(path), TXT_DOCUMENT)
        else:
            for where, record in read_records(path, source.text_field):
                yield from _text(record, source.text_field, where)


def find_files(pattern: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that a path or glob matches, sorted. A path that exists is taken literally, brackets included.

    Raises UserError where nothing matches, and for a file whose name does not end in one of `suffixes`.
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
    for candidate in (pattern, pattern.replace("[", "[[]")):
        if found := sorted(Path(p) for p in glob.glob(f"{before}/{candidate}", recursive=True) if Path(p).is_file()):
            return found
    return []


def named(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends in one of the suffixes, in any case."""
    return path.name.lower().endswith(suffixes)


def read_records(path: Path, column: str | None = None) -> Iterator[tuple[str, Record]]:
    """Pairs (file and line for error messages, record) of a .jsonl, .jsonl.gz or .parquet file.

    `column`: the only column to read from Parquet. Raises UserError, with file and line, for what cannot be read.
    """
    if named(path, ".parquet"):
        yield from _read_parquet(path, column)
    elif named(path, ".jsonl", ".jsonl.gz"):
        yield from _read_jsonl(path)
    else:
        raise UserError(f"{path} is not .jsonl, .jsonl.gz or .parquet; convert it")


def describe(source: Source) -> list[Json]:
    """JSON-able fingerprint of a source's contents (sizes and modification times), without reading them."""
    if _is_dataset(source.path):
        return [source.path, source.split, source.text_field, _open_dataset(source)._fingerprint]
    stats = [(str(path), path.stat()) for path in find_files(source.path)]
    return [source.text_field, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with _open(path) as file:
            for number, line in _lines(file):
                try:
                    record = _parse(line, path, number)
                except UserError:
                    while file.read(READ_BYTES):  # a damaged gzip file raises only at its end
                        pass
                    raise
                yield f"{path}, line {number}", record
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(
            f"{path} cannot be read as gzip ({e}); it is damaged, truncated or not gzip; download it again"
        ) from e
    except OSError as e:
        raise file_error(path, e, "read") from e


def _open(path: Path) -> io.BufferedIOBase:
    file = open(path, "rb")  # noqa: SIM115 (closed by the caller, or with the gzip file)
    compressed = named(path, ".gz") or file.peek(2)[:2] == b"\x1f\x8b"
    return gzip.GzipFile(fileobj=file) if compressed else file


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines, with LF, CR LF or CR line ends."""
    number = 0
    for line in file:
        for part in line.rstrip(b"\r\n").split(b"\r"):
            number += 1
            part = part.removeprefix(codecs.BOM_UTF8) if number == 1 else part
            if part and not part.isspace():
                yield number, part


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number} is not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {number} is not valid JSON ({e}); correct or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} holds a {type(record).__name__}, not a JSON object; correct the line")
    return record


def _text(record: Record, field: str, where: str) -> Iterator[str]:
    if field not in record:
        raise UserError(f"{where} has no field {field!r} but {sorted(record)}; set text_field")
    text = record[field]
    if text is None:  # a table's row without text
        return
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} holds a {type(text).__name__}, not text; correct it or set text_field"
        )
    if not whole(text):
        raise UserError(f"{where}: field {field!r} contains a lone surrogate (half a character); correct it")
    if text:
        yield text


def _read_txt(path: Path) -> Iterator[str]:
    """The text in chunks, with its line ends unchanged."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with open(path, "rb") as file:
            while raw := file.read(READ_BYTES):
                yield decoder.decode(raw)
                line += raw.count(b"\n")
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        line += e.object.count(b"\n", 0, e.start)
        raise UserError(f"{path}, line {line} is not UTF-8 text ({e.reason}); convert the file") from None
    except OSError as e:
        raise file_error(path, e, "read") from e


def _read_parquet(path: Path, column: str | None) -> Iterator[tuple[str, Record]]:
    require("data", "pyarrow")
    from pyarrow import parquet

    number = 0
    try:
        # Buffered, so that a column is read page by page and not as a whole.
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {column!r} but {file.schema_arrow.names}; set text_field")
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if column is None else [column]):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except UserError:
        raise
    except Exception as e:  # pyarrow's errors, OSError, ValueError, UnicodeDecodeError, …
        after = f" after row {number}" if number else ""
        raise UserError(f"{path} is not a readable Parquet file{after} ({_first_line(e)}); check the file") from e


def _is_dataset(path: str) -> bool:
    """Whether a path is a saved dataset (save_to_disk) or, where it does not exist, a name on the Hub."""
    here = Path(path)
    try:
        if here.is_dir():
            return (here / "state.json").is_file() or (here / "dataset_dict.json").is_file()
        on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.lower().endswith(SUFFIXES)
        return bool(on_hub) and not here.exists()
    except OSError:  # find_files reports it
        return False


def _rows(source: Source) -> Iterator[Record]:
    found = _open_dataset(source)
    number = 0
    try:
        for record in found:
            number += 1
            yield cast(Record, record)
    except Exception as e:  # pyarrow's, as above
        raise UserError(
            f"dataset {source.path} cannot be read after row {number} ({_first_line(e)}); restore it from its source"
        ) from e


def _open_dataset(source: Source) -> "datasets.Dataset":
    require("data", "datasets")
    import datasets

    here = Path(source.path)
    try:
        if not here.is_dir():
            return datasets.load_dataset(source.path, split=source.split)
        found = datasets.load_from_disk(str(here))
    except Exception as e:  # the Hub client raises many types
        raise UserError(f"dataset {source.path} cannot be opened ({_first_line(e)}); check the name or path") from e
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise UserError(f"dataset {source.path} has no split {source.split!r} but {sorted(found)}; set split")
        found = found[source.split]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
