"""Documents from files, datasets directories and the Hugging Face Hub, one at a time."""

import glob
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rorqual.errors import UserError
from rorqual.recipe import Source

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TXT_DOCUMENT_BYTES = 1 << 15


def read_texts(source: Source) -> Iterator[str]:
    """The documents of one source, in order; empty ones are left out.

    A .txt file is cut at line ends into documents of about 32 KB, so that one large file can be streamed,
    tokenised in parallel and partly held out. Raises UserError, with file and line, for whatever cannot be read.
    """
    if _is_dataset(source.path):
        for number, record in enumerate(_open_dataset(source), start=1):
            yield from _text(record, source.text_field, f"{source.path}, row {number}")
        return
    for path in find_files(source.path):
        if path.name.endswith(".txt"):
            yield from _read_txt(path)
        else:
            for where, record in read_records(path, source.text_field):
                yield from _text(record, source.text_field, where)


def find_files(pattern: str) -> list[Path]:
    """The file or files that a path or glob names, sorted."""
    path = Path(pattern).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        raise UserError(f"{pattern} is a directory but not a saved dataset; name the files, e.g. {pattern}/*.jsonl")
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"{pattern} does not exist; check the path")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}; convert or rename it")
    return found


def read_records(path: Path, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs (place for error messages, record) from a .jsonl, .jsonl.gz or .parquet file.

    `column` limits what is read from Parquet.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _read_parquet(path, column)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            with _open(path) as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        yield f"{path}, line {number}", _parse(line, path, number)
        else:
            raise UserError(f"{path} is not .jsonl, .jsonl.gz or .parquet; convert it")
    except (OSError, EOFError) as e:  # BadGzipFile is an OSError
        raise UserError(f"{path} cannot be read ({e}); check the file") from e


def describe(source: Source) -> list[Any]:
    """What identifies the contents of a source without reading them, for fingerprints (JSON-able)."""
    if _is_dataset(source.path):
        return [source.path, source.split, source.text_field, _open_dataset(source)._fingerprint]
    stats = [(str(path), path.stat()) for path in find_files(source.path)]
    return [source.text_field, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UserError(f"{path}, line {number} is not valid JSON ({e}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} holds a {type(record).__name__}, not a JSON object; mend the line")
    return record


def _text(record: dict[str, Any], field: str, where: str) -> Iterator[str]:
    if field not in record:
        raise UserError(f"{where} has no field {field!r} but {sorted(record)}; set text_field")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds a {type(text).__name__}, not text; mend it or set text_field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field {field!r} holds a lone surrogate, which is no character; mend it") from None
    if text:
        yield text


def _read_txt(path: Path) -> Iterator[str]:
    try:
        # newline="" keeps line ends as they are.
        with open(path, encoding="utf-8", newline="") as file:
            while lines := file.readlines(TXT_DOCUMENT_BYTES):
                yield "".join(lines)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e}); convert it") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}); check the file") from e


def _read_parquet(path: Path, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if column is not None and column not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {column!r} but {file.schema_arrow.names}; set text_field")
        number = 0
        for batch in file.iter_batches(columns=None if column is None else [column]):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a readable Parquet file ({e}); check the file") from e


def _is_dataset(path: str) -> bool:
    """Whether a path is a datasets directory (save_to_disk) or, not being on this disk, a name on the Hub."""
    here = Path(path).expanduser()
    if here.is_dir():
        return (here / "state.json").is_file() or (here / "dataset_dict.json").is_file()
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.endswith(SUFFIXES)
    return bool(on_hub) and not here.exists()


def _open_dataset(source: Source) -> Any:
    import datasets

    here = Path(source.path).expanduser()
    try:
        if not here.is_dir():
            return datasets.load_dataset(source.path, split=source.split)
        found = datasets.load_from_disk(str(here))
    except Exception as e:  # the Hub client raises many kinds
        reason = (str(e) or type(e).__name__).strip().splitlines()[0]
        raise UserError(f"dataset {source.path} cannot be opened ({reason}); check the name or path") from e
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise UserError(f"dataset {source.path} has no split {source.split!r} but {sorted(found)}; set split")
        found = found[source.split]
    return found
