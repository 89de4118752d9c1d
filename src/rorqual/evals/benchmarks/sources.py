"""Rows of a published data set: from a local file, or from the Hugging Face Hub."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.data.corpus import RECORDS, find_files, named, read_records
from rorqual.errors import UserError, file_error
from rorqual.extras import require
from rorqual.files import read_text

SUFFIXES = (*RECORDS, ".json", ".csv")
Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]  # with file and line, for error messages


@dataclass(frozen=True)
class HubData:
    """Where a data set is on the Hub. files: a pattern of its files, of a data set that is files rather than tables."""

    name: str
    config: str | None = None
    split: str = "test"
    files: str | None = None


def read_rows(path: str, columns: Sequence[str] = ()) -> Rows:
    """The rows of a .jsonl, .jsonl.gz, .parquet, .json (a list, or an object a line) or .csv file, or of a glob.

    columns: the names of a .csv file's columns where it has no line of names. Raises UserError, with file and line.
    """
    for file in find_files(path, SUFFIXES):
        if named(file, ".json"):
            yield from _listed(file)
        elif named(file, ".csv"):
            yield from _separated(file, columns)
        else:
            yield from read_records(file)


def hub_rows(data: HubData, remedy: str) -> Rows:
    """The rows of a data set on the Hub. Raises UserError, with the remedy, where it cannot be read."""
    require("data", "datasets")
    import datasets

    try:
        table = datasets.load_dataset(data.name, data.config, split=data.split)
    except Exception as e:  # the client raises many types
        raise _unreachable(data, e, remedy) from e
    for number, row in enumerate(table, start=1):
        yield f"{data.name}, row {number}", row  # pyright: ignore[reportReturnType] (rows are dictionaries)


def hub_folder(data: HubData, remedy: str) -> Path:
    """The folder of a data set's files, downloaded from the Hub. Raises UserError where it cannot be read."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(data.name, repo_type="dataset", allow_patterns=data.files))
    except Exception as e:  # as above
        raise _unreachable(data, e, remedy) from e


def is_hub_name(text: str) -> bool:
    """Whether a text may name a data set on the Hub (owner/name) and is no file here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not named(Path(text), *SUFFIXES) and not _exists(text)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long, which find_files reports
        return True


def _unreachable(data: HubData, error: Exception, remedy: str) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"{data.name} cannot be read from the Hugging Face Hub ({reason}); {remedy}")


def _listed(path: Path) -> Rows:
    try:
        text = read_text(path)
    except FileNotFoundError as e:
        raise file_error(path, e, "read") from e
    try:
        rows = json.loads(text)
        places = [f"{path}, entry {number}" for number in range(1, len(rows) + 1)] if isinstance(rows, list) else []
    except (ValueError, RecursionError):  # several objects, one a line
        rows, places = [], []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                rows.append(_line(line, path, number))
                places.append(f"{path}, line {number}")
    if isinstance(rows, dict):
        rows, places = [rows], [f"{path}"]
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}, not a list of objects; give the published file")
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{place} holds a {type(row).__name__}, not a JSON object; correct it")
        yield place, row


def _line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {number} is not valid JSON ({e}); correct or remove the line") from None


def _separated(path: Path, columns: Sequence[str]) -> Rows:
    csv.field_size_limit(1 << 27)
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        first = next(lines, [])
        names = [name.strip() for name in first]
        if columns and columns[0].lower() not in map(str.lower, names):
            names = list(columns)
            lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        for cells in lines:
            if cells:
                yield f"{path}, line {lines.line_num}", dict(zip(names, cells, strict=False))
    except FileNotFoundError as e:
        raise file_error(path, e, "read") from e
    except csv.Error as e:
        raise UserError(f"{path} is not a readable CSV file ({e}); check the file") from None
