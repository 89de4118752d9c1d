"""What callers give, as the engine takes it: numbers may be NumPy's, prompts arrays or tensors."""

import operator
from numbers import Integral, Real
from typing import Any

from rorqual.errors import UserError


def number(name: str, value: Any, whole: bool = False) -> Any:
    """Raises UserError for what is no number, or not a whole one."""
    if isinstance(value, Real) and not isinstance(value, bool):
        found = int(value) if isinstance(value, Integral) else float(value)
        if not whole or isinstance(found, int):
            return found
        if found.is_integer():
            return int(found)
    raise UserError(f"{name} = {value!r:.80}: must be a {'whole ' * whole}number")


def several(prompts: Any) -> Any:
    """Prompts; one alone is a list of one."""
    alone = isinstance(prompts, str) or (len(prompts) > 0 and _is_id(prompts[0]))
    return [prompts] if alone else prompts


def token_ids(prompt: Any, name: str) -> tuple[int, ...]:
    """Raises UserError for what holds no token ids."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise UserError(f"{name} must be text or token ids, not {prompt!r:.80}") from None


def _is_id(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
