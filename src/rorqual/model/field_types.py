"""Whether values fit the types of ModelConfig's fields."""

from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin

INT_LIMIT, MAX_NUMBER = 1 << 31, 1e12  # exclusive limit of sizes; maximum of other numbers
TYPE_NAMES = {
    int: "a whole number ≥ 0", float: "a number ≥ 0", bool: "true or false", str: "text", dict: "an object",
    list: "a list of whole numbers", NoneType: "null",
}  # fmt: skip


def fits(value: object, kind: Any) -> bool:
    """Whether a value is valid for a field of type `kind`."""
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(v, get_args(kind)[0]) for v in cast(list[object], value))
    if kind is int:
        return type(value) is int and 0 <= value < INT_LIMIT
    if kind is float:
        return type(value) in (int, float) and 0 <= cast(float, value) <= MAX_NUMBER
    return isinstance(value, get_origin(kind) or kind)


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 whose logarithm and reciprocal are finite."""
    return fits(value, float) and value >= 1 / MAX_NUMBER


def type_name(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(type_name(k) for k in get_args(kind))
    return TYPE_NAMES[get_origin(kind) or kind]
