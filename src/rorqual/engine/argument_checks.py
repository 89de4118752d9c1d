"""Arguments of the engine: numbers may be NumPy's, prompts arrays or tensors."""

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import SupportsIndex, cast

from rorqual.errors import UserError


def number(name: str, value: object, whole: bool = False) -> int | float:
    """`value` as int or float. Raises UserError for what is no number, or, if `whole`, no integer."""
    if isinstance(value, Real) and not isinstance(value, bool):
        found = int(value) if isinstance(value, Integral) else float(value)
        if not whole or isinstance(found, int):
            return found
        if found.is_integer():
            return int(found)
    raise UserError(f"{name} = {value!r:.80}: must be a {'whole ' * whole}number")


def prompt_list(prompts: Sequence[str] | Sequence[Sequence[int]]) -> Sequence[str | Sequence[int]]:
    """Prompts as a list; a single prompt becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    return [cast(Sequence[int], prompts)] if len(prompts) > 0 and _is_id(prompts[0]) else prompts


def token_ids(prompt: Iterable[SupportsIndex], name: str) -> tuple[int, ...]:
    """A prompt's token ids. Raises UserError if it is none."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise UserError(f"{name} must be text or token ids, not {prompt!r:.80}") from None


def _is_id(value: object) -> bool:
    try:
        operator.index(cast(SupportsIndex, value))
    except TypeError:
        return False
    return True
