"""Worked solutions of knights and knaves: cases, one after the other, each tested against every statement."""

from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

from rorqual.rl.envs.environment import Problem
from rorqual.rl.worked.style import OPENINGS, Worked

WORDS = {"and": " and ", "or": " or ", "<=>": " exactly if "}


def knights_knaves(problem: Problem, rng: Random) -> Worked:
    """Tries who tells the truth, in random order, until a case holds."""
    puzzle = problem.metadata
    names = [str(name) for name in puzzle["names"]]
    statements = puzzle["statements"]
    cases = list(product((True, False), repeat=len(names)))
    rng.shuffle(cases)
    lines = [rng.choice(OPENINGS)]
    for name, statement in zip(names, statements, strict=True):
        lines.append(f"{name} says: {_text(statement, puzzle)}.")
    for case in cases:
        lines.append(f"Suppose {_who(case, puzzle)}.")
        failed = _test(case, statements, puzzle, lines)
        if not failed:
            lines.append("Everything fits, so this is the solution.")
            return Worked("\n".join(lines), f"{_who(case, puzzle, ', and ')}")
        lines.append("This case is out.")
    raise AssertionError(f"no case holds: {problem.question}")


def _test(case: tuple[bool, ...], statements: Sequence[Any], puzzle: dict[str, Any], lines: list[str]) -> bool:
    """Adds a line for each statement until one contradicts its speaker; returns whether one does."""
    knight, knave = _role(True, puzzle), _role(False, puzzle)
    for i, statement in enumerate(statements):
        true = _holds(statement, case)
        name, role = puzzle["names"][i], knight if case[i] else knave
        if true == case[i]:
            lines.append(f"What {name} says is then {_truth(true)}, as {role} would say.")
        else:
            lines.append(f"What {name} says is then {_truth(true)}, but {name} is {role}: a contradiction.")
            return True
    return False


def _truth(true: bool) -> str:
    return "true" if true else "false"


def _holds(statement: Sequence[Any], case: tuple[bool, ...]) -> bool:
    kind, parts = str(statement[0]), list[Any](statement[1:])
    if kind == "telling-truth":
        return bool(case[int(parts[0])])
    if kind == "lying":
        return not case[int(parts[0])]
    values = [_holds(part, case) for part in parts]
    if kind == "not":
        return not values[0]
    if kind == "->":
        return not values[0] or values[1]
    if kind == "<=>":
        return values[0] == values[1]
    return all(values) if kind == "and" else any(values)


def _who(case: tuple[bool, ...], puzzle: dict[str, Any], join: str = " and ") -> str:
    return join.join(f"{name} is {_role(k, puzzle)}" for name, k in zip(puzzle["names"], case, strict=True))


def _role(knight: bool, puzzle: dict[str, Any]) -> str:
    return str(puzzle["knight_knave_terms"]["a_knight" if knight else "a_knave"])


def _text(statement: Sequence[Any], puzzle: dict[str, Any], inner: bool = False) -> str:
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return f"{puzzle['names'][parts[0]]} is {_role(kind == 'telling-truth', puzzle)}"
    if kind == "not":
        return f"it is not so that {_text(parts[0], puzzle, True)}"
    if kind == "->":
        return f"if {_text(parts[0], puzzle, True)}, then {_text(parts[1], puzzle, True)}"
    text = WORDS[kind].join(_text(part, puzzle, True) for part in parts)
    return f"({text})" if inner else text
