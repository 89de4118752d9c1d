"""Compact text of reasoning-gym's knights_knaves: which persons tell the truth and which lie?

A statement is a nested tuple: ("telling-truth", i), ("lying", i), ("not", s), or an operator ("and", "or", "->",
"<=>") with its operands; statement i is made by person i.
"""

from collections.abc import Sequence
from typing import Any

SIGNS = {"and": " and ", "or": " or ", "->": " -> ", "<=>": " <-> "}


def claims(metadata: dict[str, Any]) -> str:
    """All statements as text: "Ava: Liam knave. Liam: Ava knight -> Liam knight."."""
    statements = zip(metadata["names"], metadata["statements"], strict=True)
    return " ".join(f"{name}: {_text(statement, metadata)}." for name, statement in statements)


def key(metadata: dict[str, Any]) -> str:
    """Split key: equal for puzzles that differ only in names."""
    return str(metadata["statements"])


def _text(statement: Sequence[Any], metadata: dict[str, Any], inner: bool = False) -> str:
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        role = "knight" if kind == "telling-truth" else "knave"
        return f"{metadata['names'][parts[0]]} {metadata['knight_knave_terms'][role]}"
    if kind == "not":
        return f"not {_text(parts[0], metadata, inner=True)}"
    text = SIGNS[kind].join(_text(part, metadata, inner=True) for part in parts)
    return f"({text})" if inner else text
