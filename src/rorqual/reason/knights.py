"""reasoning-gym's knights_knaves in few words: who tells the truth, where the liars lie about it?

A statement is a nested tuple: ("telling-truth", i), ("lying", i), ("not", s), or an operator ("and", "or", "->",
"<=>") with its operands; person i says statement i.
"""

import itertools
from collections.abc import Sequence
from typing import Any

SIGNS = {"and": " and ", "or": " or ", "->": " -> ", "<=>": " <-> "}


def claims(metadata: dict[str, Any]) -> str:
    """What everybody says: "Ava: Liam knave. Liam: Ava knight -> Liam knight."."""
    told = zip(metadata["names"], metadata["statements"], strict=True)
    return " ".join(f"{name}: {_words(statement, metadata)}." for name, statement in told)


def roles(metadata: dict[str, Any]) -> tuple[str, str]:
    """The puzzle's words for those who tell the truth, and those who lie."""
    terms = metadata["knight_knave_terms"]
    return str(terms["knight"]), str(terms["knave"])


def key(metadata: dict[str, Any]) -> str:
    """The same for puzzles that differ in names alone."""
    return str(metadata["statements"])


def holds(statement: Sequence[Any], honest: Sequence[bool]) -> bool:
    """Whether a statement is true where `honest[i]` says that person i tells the truth."""
    kind, *parts = statement
    match kind:
        case "telling-truth":
            return honest[parts[0]]
        case "lying":
            return not honest[parts[0]]
        case "not":
            return not holds(parts[0], honest)
        case "and":
            return all(holds(part, honest) for part in parts)
        case "or":
            return any(holds(part, honest) for part in parts)
        case "->":
            return not holds(parts[0], honest) or holds(parts[1], honest)
        case "<=>":
            return holds(parts[0], honest) == holds(parts[1], honest)
    raise ValueError(f"unknown statement {statement!r}")


def assumptions(metadata: dict[str, Any]) -> list[tuple[bool, ...]]:
    """Every way of telling who is honest."""
    return list(itertools.product((True, False), repeat=len(metadata["names"])))


def check(metadata: dict[str, Any], honest: Sequence[bool]) -> list[bool]:
    """The truth of each statement in turn, up to the first that its speaker could not have made."""
    found = []
    for statement, speaker in zip(metadata["statements"], honest, strict=True):
        found.append(holds(statement, honest))
        if found[-1] != speaker:
            break
    return found


def fits(honest: Sequence[bool], found: Sequence[bool]) -> bool:
    """Whether `check` found no contradiction."""
    return list(honest) == list(found)


def _words(statement: Sequence[Any], metadata: dict[str, Any], inner: bool = False) -> str:
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return f"{metadata['names'][parts[0]]} {roles(metadata)[kind == 'lying']}"
    if kind == "not":
        return f"not {_words(parts[0], metadata, inner=True)}"
    text = SIGNS[kind].join(_words(part, metadata, inner=True) for part in parts)
    return f"({text})" if inner else text
