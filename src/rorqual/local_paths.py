"""Expand `~` and environment variables in paths."""

import os
import re

from rorqual.errors import UserError

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def local_path(text: str) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced; a path that exists literally is unchanged.

    Raises UserError for an unknown user or variable, and for a NUL character.
    """
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot contain a NUL character; remove it")
    if (not text.startswith("~") and "$" not in text) or os.path.lexists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{text}: the environment variable {name} is not set; set it, or write the path in full")
        return os.environ[name]

    path = os.path.expanduser(VARIABLE.sub(value, text))
    if path.startswith("~"):
        raise UserError(
            f"{text}: {path.partition('/')[0]} is not a user's home; write the path in full, or as ./{text}"
        )
    return path
