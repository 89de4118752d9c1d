"""BFCL's check of function calls against the accepted ones (Patil et al., ICML 2025; its "AST evaluation").

Written from the behaviour of the published checker for Python: a call must have the function's name, all required
parameters, no unknown one, values of the documented type and among the accepted ones; "" among those means that the
parameter may be left out. Strings are compared without case, spaces and ,./-_*^.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Call = tuple[str, Mapping[str, Any]]  # name, arguments
Accepted = Mapping[str, Sequence[Any]]  # parameter → its accepted values

TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip


def calls_match(
    calls: Sequence[Call], accepted: Sequence[Mapping[str, Accepted]], functions: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether every accepted call has a call of its own, in any order, and none is left.

    accepted: per call {name: accepted values}. functions: descriptions with `name` and `parameters`.
    """
    if len(calls) != len(accepted):
        return False
    left = list(calls)
    for wanted in accepted:
        name, values = next(iter(wanted.items()))
        described = next((function for function in functions if function["name"] == name), None)
        fits = [i for i, call in enumerate(left) if described and _call_matches(call, name, values, described)]
        if not fits:
            return False
        del left[fits[0]]
    return True


def _call_matches(call: Call, name: str, accepted: Accepted, described: Mapping[str, Any]) -> bool:
    found, arguments = call
    properties: Mapping[str, Any] = described["parameters"]["properties"]
    if found != name or any(p not in arguments for p in described["parameters"].get("required", ())):
        return False
    if any(p not in properties or p not in accepted for p in arguments):
        return False
    if any(p not in arguments and "" not in values for p, values in accepted.items()):
        return False
    return all(_value_matches(value, accepted[p], properties[p]) for p, value in arguments.items())


def _value_matches(value: Any, accepted: Sequence[Any], described: Mapping[str, Any]) -> bool:
    kind = str(described.get("type"))
    wanted = TYPES.get(kind, str)
    if kind == "float" and type(value) is int:
        value = float(value)
    # Where the accepted values are of another type than the documented one, they name a variable.
    known = _first_type(accepted)
    if type(value) is not wanted or (known is not None and known is not wanted):
        return type(value) in (wanted, known) and value in accepted
    if wanted is dict:
        return any(one != "" and _dict_matches(value, one) for one in accepted)
    if wanted is list:
        return _list_matches(value, accepted, TYPES.get(str(described.get("items", {}).get("type")), str))
    if wanted is str:
        return squeezed(value) in [squeezed(one) for one in accepted if isinstance(one, str)]
    return value in accepted


def _list_matches(value: list[Any], accepted: Sequence[Any], inner: type) -> bool:
    lists: list[list[Any]] = [
        list(one) for one in accepted if isinstance(one, list) or one == ""
    ]  # that it may be left out is []
    if inner is dict:
        return all(isinstance(part, dict) for part in value) and any(
            len(one) == len(value) and all(map(_dict_matches, value, one)) for one in lists
        )
    if not any(all(type(part) in (inner, _first_type(one)) for part in value) for one in lists):
        return False
    return _squeezed_all(value) in [_squeezed_all(one) for one in lists]


def _first_type(values: Sequence[Any]) -> type | None:
    return next((type(one) for one in values if one != ""), None)


def _dict_matches(value: Mapping[str, Any], accepted: Accepted) -> bool:
    """accepted: key → accepted values, as of parameters."""
    if any(key not in accepted for key in value):
        return False
    if any(key not in value and "" not in values for key, values in accepted.items()):
        return False
    return all(_squeezed(found) in _squeezed_all(accepted[key]) for key, found in value.items())


def _squeezed_all(values: Sequence[Any]) -> list[Any]:
    return [_squeezed(value) for value in values]


def _squeezed(value: Any) -> Any:
    return squeezed(value) if isinstance(value, str) else value


def squeezed(text: str) -> str:
    """A string as it is compared."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
