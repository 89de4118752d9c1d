"""reasoning-gym's knights_knaves in few words: who tells the truth, where the liars lie about it?

A statement is a nested tuple: ("telling-truth", i), ("lying", i), ("not", s), or an operator ("and", "or", "->",
"<=>") with its operands; person i says statement i.
"""

from collections.abc import Sequence
from typing import Any

SIGNS = {"and": " and ", "or": " or ", "->": " -> ", "<=>": " <-> "}


def claims(metadata: dict[str, Any]) -> str:
    """What everybody says: "Ava: Liam knave. Liam: Ava knight -> Liam knight."."""
    told = zip(metadata["names"], metadata["statements"], strict=True)
    return " ".join(f"{name}: {_words(statement, metadata)}." for name, statement in told)


def key(metadata: dict[str, Any]) -> str:
    """The same for puzzles that differ in names alone."""
    return str(metadata["statements"])


def _words(statement: Sequence[Any], metadata: dict[str, Any], inner: bool = False) -> str:
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        role = "knight" if kind == "telling-truth" else "knave"
        return f"{metadata['names'][parts[0]]} {metadata['knight_knave_terms'][role]}"
    if kind == "not":
        return f"not {_words(parts[0], metadata, inner=True)}"
    text = SIGNS[kind].join(_words(part, metadata, inner=True) for part in parts)
    return f"({text})" if inner else text
