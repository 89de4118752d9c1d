"""Worked solutions of sums, of linear equations and of legs to count."""

import re
from importlib import import_module
from random import Random
from typing import Any, cast

from rorqual.rl.envs.environment import Problem
from rorqual.rl.worked.style import AGREES, CHECKS, DIFFERS, OPENINGS, Worked, an, slips

TERM = re.compile(r"([+-]?)(?:(\d+)\*?)?([a-z])?")
Line = tuple[str, int]  # what is said of a step, and its result


def chain_sum(problem: Problem, rng: Random) -> Worked:
    """Adds from left to right, then checks in another order."""
    words = problem.metadata["expression"].split()
    terms = [int(words[0])] + [int(n) if op == "+" else -int(n) for op, n in zip(words[1::2], words[2::2], strict=True)]
    lines = [rng.choice(OPENINGS)]
    wrong = rng.choice((-10, -1, 1, 10)) if slips(rng) else 0
    lines += _sum_lines(terms, rng, wrong)
    other = sorted(terms, key=lambda t: (t < 0, -abs(t)))
    if other == terms:
        other = [*terms[1:], terms[0]] if terms[1] >= 0 else terms
    lines.append(rng.choice(CHECKS))
    lines += _sum_lines(other, rng)
    if wrong:
        lines += [rng.choice(DIFFERS), *_sum_lines(terms, rng)]
    lines.append(rng.choice(AGREES))
    return Worked("\n".join(lines), str(sum(terms)))


def _sum_lines(terms: list[int], rng: Random, slip: int = 0) -> list[str]:
    """A line for each addition; `slip` is added to the result of one of them, and carried on."""
    total, lines = terms[0], list[str]()
    at = rng.randrange(1, len(terms)) if slip else 0
    for i, term in enumerate(terms[1:], 1):
        text, result = _add(total, term)
        if i == at:
            result += slip
            text = f"{total} {_signed(term)} = {result}."
        lines.append(text)
        total = result
    return lines


def _add(a: int, b: int) -> Line:
    """47 + 38: 47 + 30 = 77, 77 + 8 = 85."""
    result = a + b
    tens, ones = divmod(abs(b), 10)
    head = f"{a} {_signed(b)}"
    if not tens or not ones:
        return f"{head} = {result}.", result
    sign = 1 if b >= 0 else -1
    middle = a + sign * 10 * tens
    return f"{head}: {a} {_signed(sign * 10 * tens)} = {middle}, {middle} {_signed(sign * ones)} = {result}.", result


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"


def simple_equations(problem: Problem, rng: Random) -> Worked | None:
    """Collects the variable's terms, then moves the rest and divides; checks by putting the solution in."""
    left, _, right = problem.metadata["equation"].partition(" = ")
    name, found, value = problem.metadata["variable"], _linear(left), int(right) if _is_int(right) else None
    if found is None or value is None or not found[0]:
        return None
    factor, constant = found
    lines = [rng.choice(OPENINGS)]
    shown = f"{factor}*{name}" + (f" {_signed(constant)}" if constant else "")
    if shown != left:
        lines.append(f"The left side is {left}, which is {shown}.")
    rest = value - constant
    if constant:
        how = "subtract" if constant > 0 else "add"
        side = f"{value} {_signed(-constant)} = {rest}"
        lines.append(f"I {how} {abs(constant)} on both sides: {factor}*{name} = {side}.")
    solution, remainder = divmod(rest, factor)
    if remainder:
        return None
    if slips(rng):
        wrong = solution + rng.choice((-2, -1, 1, 2))
        lines += [
            f"Dividing by {factor} gives {name} = {wrong}.",
            rng.choice(CHECKS),
            f"{factor} * {wrong} = {factor * wrong}, but it must be {rest}.",
            rng.choice(DIFFERS),
        ]
    lines.append(f"{rest} / {factor} = {solution}, so {name} = {solution}.")
    tail = f", and {factor * solution} {_signed(constant)} = {value}" if constant else ""
    lines += [rng.choice(CHECKS), f"{factor} * {solution} = {factor * solution}{tail}.", rng.choice(AGREES)]
    return Worked("\n".join(lines), str(solution))


def _linear(text: str) -> tuple[int, int] | None:
    """4*h + 2*h - 3 → (6, -3): the variable's factor and the constant; None for anything that is not linear."""
    factor = constant = 0
    joined = text.replace(" ", "")
    while joined:
        match = TERM.match(joined)
        if match is None or not match[0] or (match[2] is None and match[3] is None):
            return None
        number = (-1 if match[1] == "-" else 1) * int(match[2] or 1)
        if match[3]:
            factor += number
        else:
            constant += number
        joined = joined[match.end() :]
        if joined and joined[0] not in "+-":
            return None
    return factor, constant


def _is_int(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


def leg_counting(problem: Problem, rng: Random) -> Worked:
    """Legs of each kind of animal, with a running total."""
    legs: dict[str, int] = import_module("reasoning_gym.arithmetic.leg_counting").ANIMALS
    animals = cast("dict[str, Any]", problem.metadata["animals"])
    lines, total = [rng.choice(OPENINGS)], 0
    totals: list[int] = []
    for i, (animal, count) in enumerate(animals.items()):
        here = count * legs[animal]
        has = "has no legs" if not legs[animal] else f"has {legs[animal]} legs"
        running = f", {total} + {here} = {total + here}" if i else ""
        lines.append(f"{an(animal).capitalize()} {has}: {count} * {legs[animal]} = {here}{running}.")
        total += here
        totals.append(here)
    if len(totals) > 1 and rng.random() < 0.5:
        lines += [rng.choice(CHECKS), f"{' + '.join(map(str, totals))} = {total}.", rng.choice(AGREES)]
    return Worked("\n".join(lines), str(total))
