"""File helpers: read with clear errors, write atomically, lock."""

import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rorqual.errors import UserError, file_error
from rorqual.strict_json import Json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def read_text(path: Path) -> str:
    """A text file in UTF-8 (with or without BOM) or UTF-16 with BOM, as PowerShell writes.

    Raises UserError, with the line, for any other encoding; FileNotFoundError unchanged.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise file_error(path, e, "read") from e
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text ({e.reason}); save the file as UTF-8") from None


def read_json(path: Path, then: str) -> Json:
    """The value of a JSON file. Raises UserError, with what to do `then` where it is damaged, or FileNotFoundError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as e:
        raise file_error(path, e, "read") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); {then}") from e


def check_link(path: Path) -> None:
    """Raises UserError for a dangling link: its disk may be absent and its target intact."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {path.readlink()}, which does not exist; mount its disk, or remove the link"
        )


def write_text(path: Path, text: str, then: str = "") -> None:
    """Write a UTF-8 file, which appears whole or not at all, also after a power failure.

    Raises UserError; `then`: what to do once the cause is fixed.
    """
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        force_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise file_error(path, e, then=then) from e


@contextmanager
def write_folder(path: Path, move: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `path` after the block.

    `path` appears whole or not at all, also after a power failure. An exception in the block leaves nothing behind.
    `move(folder, path)` puts the folder in its place. Raises OSError.
    """
    temporary = _beside(path)
    discard(temporary)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            force_to_disk(written)
        move(temporary, path)
        force_to_disk(path.parent)
    finally:
        discard(temporary)


def _beside(path: Path) -> Path:
    return path.with_name(f".writing-{path.name}")


def force_to_disk(path: Path) -> None:
    """fsync of a file or a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder, or a link to one; what cannot be removed stays."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`. Raises UserError with `taken` where another process holds it.

    The system releases the lock when the process ends; child processes do not inherit it. The file is not removed.
    """
    try:
        file = path.open("a+")
    except OSError as e:
        raise file_error(path, e) from e
    with file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise UserError(
                    f"{taken} (process {file.read().strip() or 'unknown'}); wait for it or stop it"
                ) from None
            except OSError as e:  # a file system without locks
                print(f"{path}: no lock ({e.strerror}); start no second run in this folder", file=sys.stderr)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
