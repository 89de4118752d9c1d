"""Paths as people write them, text files as their editors save them."""

import codecs
import os
import re
from pathlib import Path

from rorqual.errors import UserError

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def local_path(text: str) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced; a name that exists as it is written stays.

    Raises UserError for a user or a variable that there is not.
    """
    if "\0" in text:
        raise UserError(f"{text!r}: a path holds no NUL character; remove it")
    if (not text.startswith("~") and "$" not in text) or os.path.lexists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{text}: the environment variable {name} is not set; set it, or write the path in full")
        return os.environ[name]

    path = os.path.expanduser(VARIABLE.sub(value, text))
    if path.startswith("~"):
        raise UserError(f"{text}: {path.partition('/')[0]} is nobody's home; write the path in full, or as ./{text}")
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without byte order mark, or in UTF-16 with one, as PowerShell writes.

    Raises UserError naming the line for any other encoding; FileNotFoundError passes.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); check the path and its permissions") from e
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text ({e.reason}); save the file as UTF-8") from None
