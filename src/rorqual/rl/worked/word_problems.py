"""Worked solutions of gsm_symbolic: the dataset's own steps, with each of their calculations done again as a check."""

import re
from fractions import Fraction
from random import Random

from rorqual.rl.envs.environment import Problem
from rorqual.rl.worked.style import AGREES, CHECKS, OPENINGS, Worked

NUMBER = r"(\d+(?:\.\d+)?)"
# A calculation of two numbers; not the end of a longer one.
CALCULATION = re.compile(
    rf"(?<![\w.])(?<![-+*x/] )(?<![-+*x/(]){NUMBER} ?([-+*x/]) ?{NUMBER} ?= ?{NUMBER}(?![\w.]| ?[-+*x/])"
)


def gsm_symbolic(problem: Problem, rng: Random) -> Worked | None:
    """None where the steps do not end on the answer, or where one of their calculations is wrong."""
    steps, _, last = str(problem.metadata["answer_cot"]).rpartition("####")
    if not steps.strip() or last.strip() != problem.answer:
        return None
    lines = [line.strip() for line in steps.strip().splitlines() if line.strip()]
    found = [match.groups() for line in lines for match in CALCULATION.finditer(line)]
    if not all(_right(*each) for each in found):
        return None
    text = [rng.choice(OPENINGS), *lines]
    if found and rng.random() < 0.6:
        a, op, b, result = found[-1]
        text += [rng.choice(CHECKS), _undone(a, op, b, result), rng.choice(AGREES)]
    text.append(f"So the answer is {problem.answer}.")
    return Worked("\n".join(text), problem.answer)


def _right(a: str, op: str, b: str, result: str) -> bool:
    return _value(Fraction(a), op, Fraction(b)) == Fraction(result)


def _value(a: Fraction, op: str, b: Fraction) -> Fraction | None:
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "/":
        return a / b if b else None
    return a * b


def _undone(a: str, op: str, b: str, result: str) -> str:
    """The calculation backwards: 5 + 3 = 8 → 8 - 3 = 5."""
    if op == "+":
        return f"{result} - {b} = {a}."
    if op == "-":
        return f"{result} + {b} = {a}."
    if op == "/":
        return f"{result} * {b} = {a}."
    return f"{result} / {b} = {a}." if Fraction(b) else f"{b} * {a} = {result}."
