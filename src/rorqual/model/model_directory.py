"""Find a model's files, and diagnose those that cannot be read."""

import json
import os
from pathlib import Path
from typing import Any

from rorqual.errors import UserError, file_error
from rorqual.strict_json import Json

# Where a run's folder holds its model; a distillation has it in the student's run.
RUN_SUBDIRECTORIES = ("model", "student/model")
IN_EVERY_MODEL = ("config.json", "tokenizer.json")
MAGIC_BYTES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run 'git lfs pull' there",
    b"GGUF": "is a GGUF file; give it as the model, with a name that ends in .gguf",
    b"PK\x03\x04": "is a zip archive, as PyTorch writes; convert it to safetensors with transformers' save_pretrained",
    b"\x80\x02": "is a Python pickle, which can run code when read; convert it to safetensors",
    b"\x1f\x8b": "is compressed with gzip; unpack it",
}


def is_gguf(path: str | Path) -> bool:
    """Whether a path has the suffix .gguf and is no directory."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def check_directory(path: str | Path) -> None:
    """Raises UserError for a GGUF file, where a directory of safetensors is needed."""
    if is_gguf(path) and not Path(path).is_dir():
        raise UserError(
            f"{path} is a GGUF file, where a model directory is needed; make one: rorqual import {path} DIRECTORY"
        )


def model_directory(path: str | Path) -> Path:
    """A model's directory; for a run's folder that of the model in it."""
    path = Path(path)
    for found in (path, *(path / inner for inner in RUN_SUBDIRECTORIES)):
        if os.path.exists(found / "config.json"):
            return found
    return path


def check_destination(path: Path, source: Path | None = None) -> None:
    """Raises UserError if `path` is `source`, or a directory with other files than a model's."""
    if source is not None and path.exists() and path.samefile(source):
        raise UserError(f"{path} is the source model itself; give another directory to write")
    try:
        foreign = path.exists() and not (path / "config.json").exists() and next(path.iterdir(), None)
    except OSError as e:
        raise file_error(path, e, then="or give another directory") from e
    if foreign:
        raise UserError(f"{path} is not a model directory (it holds {foreign.name}); give another directory to write")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a file that holds none."""
    try:
        found: Json = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise unreadable(path, e) from None
    except (ValueError, RecursionError) as e:
        raise UserError(
            foreign(path, b"{") or f"{path} is not valid JSON ({e}); restore the file from its source"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(found).__name__}; restore it from its source")
    return found


def unreadable(path: Path, error: OSError) -> UserError:
    """The UserError of an OSError on reading a file."""
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return UserError(f"{path} is a link to {path.readlink()}, which does not exist; fetch the file again")
        if path.name in IN_EVERY_MODEL and (path.parent / "recipe.toml").is_file():
            return UserError(
                f"{path.parent} is the folder of a run that has no model yet; let it end (--resume continues it), or "
                "name another model"
            )
        return UserError(f"{path} does not exist; fetch it, or check the name")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a directory, not a file; remove it and fetch the file")
    if isinstance(error, NotADirectoryError):
        return UserError(f"{path} does not exist: {path.parent} is not a directory; check the name")
    return file_error(path, error, "read")


def foreign(path: Path, expected: bytes = b"") -> str | None:
    """An error message for a file of another kind, else None. expected: first bytes of the expected kind."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError as e:
        return str(unreadable(path, e))
    if size == 0:
        return f"{path} is empty; fetch it again"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not the file itself; fetch it again, logged in where the site asks for it"
    for mark, sentence in MAGIC_BYTES.items():
        if begin.startswith(mark) and mark != expected:
            return f"{path} {sentence}"
    if expected != b"{" and begin.lstrip()[:1] == b"{" and b"\0" not in begin:
        return f"{path} is JSON, not the file itself; fetch it again"
    return None
