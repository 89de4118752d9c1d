"""reasoning-gym's countdown without sympy: the same problems and scores, about 100 times faster.

Tests compare `generate` and `score` with reasoning-gym's own on random cases.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import Any

ATTEMPTS = 100  # as in reasoning-gym
MAX_LENGTH = 200  # characters of an answer
FORBIDDEN = re.compile(r"[^0-9+\-*/() ]|\*\*|//|\d{13}")  # no powers, no numbers of more than 12 digits
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction.__truediv__,
}


def generate(config: Any, templates: Sequence[str], wrapper: str, seed: int) -> dict[str, Any] | None:
    """The entry `CountdownDataset[idx]` for `seed` = dataset seed + idx; None where the dataset would raise.

    The random draws are in the same order. Only the expression's text differs: it has the order in which it was built,
    where sympy sorts its terms.
    """
    rng = Random(seed)
    count = rng.randint(config.min_numbers, config.max_numbers)
    for _ in range(ATTEMPTS):
        expression, numbers, target = _candidate(config, rng, count)
        if config.min_target <= target <= config.max_target:
            break
    else:
        return None
    if config.shuffle:
        rng.shuffle(numbers)
    question = rng.choice(templates).format(numbers=", ".join(map(str, numbers)), target=target)
    return {
        "question": wrapper.format(question=question),
        "answer": expression,
        "metadata": {"numbers": numbers, "target": target, "expression": expression},
    }


def _candidate(config: Any, rng: Random, count: int) -> tuple[str, list[int], int]:
    numbers = [rng.randint(config.min_value, config.max_value) for _ in range(count)]
    value, text, summed = numbers[0], str(numbers[0]), False
    for i in range(1, count):
        sign = rng.choice(config.operators)
        if sign == "/":
            divisors = numbers[i:]
            rng.shuffle(divisors)
            exact = next((d for d in divisors if value % d == 0), None)
            if exact is None:
                sign = "-"
            else:
                numbers[i] = exact
        if sign in "*/" and summed:
            text = f"({text})"
        summed = sign in "+-"
        text = f"{text} {sign} {numbers[i]}"
        value = {"+": value + numbers[i], "-": value - numbers[i], "*": value * numbers[i]}.get(
            sign, value // numbers[i]
        )
    return text, numbers, value


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of integers, + - * / and parentheses; None for any other syntax."""
    if len(expression) > MAX_LENGTH or FORBIDDEN.search(expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("not arithmetic")


def score(answer: str, numbers: Sequence[int], target: int) -> float:
    """reasoning-gym's score: 1 for a solution, 0.05 for another valid expression, 0.01 for anything else.

    One difference: division by zero is invalid here, where sympy continues with infinity.
    """
    value = evaluate(answer)
    if value is None:
        return 0.01
    used = sorted(int(run) for run in re.findall(r"\d+", answer))
    # As reasoning-gym: np.isclose of the float value with rtol 1e-5 and atol 1e-6.
    close = abs(float(value) - target) <= 1e-6 + 1e-5 * abs(target)
    return 1.0 if used == sorted(numbers) and close else 0.05
