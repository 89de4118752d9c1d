"""Standard JSON, also for non-finite numbers.

JSON has no NaN and Infinity, and most readers (jq, browsers, databases) refuse them. Here they are strings.
"""

import json
import math
import sys
from typing import Any, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None  # what `json.loads` returns


def finite(value: Any) -> Any:
    """The value with "nan", "inf" and "-inf" for non-finite numbers, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def is_finite(value: Any) -> bool:
    """Whether it is a number within the range of a float; JSON's integers are unbounded."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` of `finite(value)`."""
    return json.dumps(finite(value), allow_nan=False, **options)
