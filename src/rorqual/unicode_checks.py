"""Lone surrogates (half characters): JSON and command-line bytes can contain them, UTF-8 cannot."""

import json


def whole(text: str) -> bool:
    """Whether a text has no lone surrogates, so that UTF-8 can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_inside(value: object) -> bool:
    """`whole` for all texts within a JSON or Parquet value."""
    return whole(value) if isinstance(value, str) else whole(json.dumps(value, ensure_ascii=False, default=str))
