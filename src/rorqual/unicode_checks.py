"""Half characters (lone surrogates): JSON and a command line's bytes bring them into texts, and UTF-8 holds none."""

import json
from typing import Any


def whole(text: str) -> bool:
    """Whether a text has whole characters only, so that it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_inside(value: Any) -> bool:
    """The same of all texts in what JSON or Parquet holds."""
    return whole(value) if isinstance(value, str) else whole(json.dumps(value, ensure_ascii=False, default=str))
