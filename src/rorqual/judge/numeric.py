"""Evaluate `algebra` trees: exact rational arithmetic, and 50-digit values at fixed points for the rest.

Run time is bounded: values beyond the limits below are not computed.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any

from rorqual.judge.algebra import Tree

BITS = 20_000  # limit of an exact number's numerator and denominator
LARGEST = 10**6  # limit of exponents and arguments
POINTS = 5
DIGITS = 50


class Undecided(ArithmeticError):
    """The value is undefined, or too large to compute."""


def has(tree: Any, op: str) -> bool:
    return isinstance(tree, tuple | list) and any(part == op or has(part, op) for part in tree)


def exact(tree: Tree) -> Fraction:
    """The exact value of rational arithmetic. Raises Undecided for everything else, and beyond BITS."""
    match tree:
        case ("num", value, _):
            return value
        case ("+" | "-" | "*" | "/" as op, left, right):
            a, b = exact(left), exact(right)
            if op == "/" and not b:
                raise Undecided("division by zero")
            value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
        case ("^", left, right):
            a, b = exact(left), exact(right)
            if b.denominator != 1 or abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) > BITS:
                raise Undecided("power")
            if not a and b <= 0:
                raise Undecided("power of zero")
            value = a ** int(b)
        case ("call", "abs", inner):
            return abs(exact(inner))
        case ("call", "floor" | "ceil" as name, inner):
            return Fraction(getattr(math, name)(exact(inner)))
        case ("call", "factorial", inner):
            n = exact(inner)
            if n.denominator != 1 or not 0 <= n <= 1000:
                raise Undecided("factorial")
            return Fraction(math.factorial(int(n)))
        case ("call", "binom", upper, lower):
            n, k = exact(upper), exact(lower)
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
                raise Undecided("binomial")
            return Fraction(math.comb(int(n), int(k)))
        case ("call", "sqrt", inner):
            value = exact(inner)
            roots = math.isqrt(max(value.numerator, 0)), math.isqrt(value.denominator)
            if Fraction(*roots) ** 2 != value:
                raise Undecided("root")
            return Fraction(*roots)
        case _:
            raise Undecided(tree[0])
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise Undecided("too large")
    return value


def exactly(tree: Tree) -> Fraction | None:
    try:
        return exact(tree)
    except Undecided:
        return None


@functools.cache
def context() -> Any:
    from mpmath.ctx_mp import MPContext

    made = MPContext()
    made.dps = DIGITS
    return made


def near(a: Any, b: Any) -> bool:
    if a == b:  # infinities
        return True
    if max(abs(a), abs(b)) == context().inf:
        return False
    return abs(a - b) <= 1e-35 * max(abs(a), abs(b)) or (abs(a) < 1e-40 and abs(b) < 1e-40)


def free_names(tree: Any) -> set[str]:
    """The variables of a tree: all names except constants."""
    if isinstance(tree, tuple) and tree and tree[0] == "name":
        return {tree[1]} - {"π", "∞", "e", "i"}
    return set().union(*map(free_names, tree)) if isinstance(tree, tuple | list) else set()


def values(trees: Sequence[Tree]) -> list[tuple[Any, ...]]:
    """The trees' values at a few points where all are defined. Raises Undecided where there are none."""
    names = sorted(set().union(*map(free_names, trees)))
    found = []
    for k in range(POINTS if names else 1):
        point = {name: _coordinate(name, k) for name in names}
        try:
            found.append(tuple(_value(tree, point) for tree in trees))
        except (Undecided, ValueError, OverflowError, ZeroDivisionError, MemoryError):
            continue
    if not found:
        raise Undecided("no value")
    return found


def _coordinate(name: str, k: int) -> Fraction:
    """A fixed coordinate of magnitude 0.2 to 2; negative at every third point."""
    value = Fraction(Random(f"{name}/{k}").randrange(200_000, 2_000_000), 1_000_000)
    return -value if k % 3 == 2 else value


def _value(tree: Tree, point: dict[str, Fraction]) -> Any:
    """The value at a point, as a complex number of DIGITS digits."""
    numbers = context()
    match tree:
        case ("num", value, _):
            result = numbers.mpf(value.numerator) / value.denominator
        case ("name", "π"):
            result = +numbers.pi
        case ("name", "e"):
            result = +numbers.e
        case ("name", "i"):
            result = numbers.mpc(0, 1)
        case ("name", "∞"):
            return numbers.mpc(numbers.inf)
        case ("name", name):
            result = numbers.mpf(point[name].numerator) / point[name].denominator
        case ("+" | "-" | "*" | "/" as op, left, right):
            a, b = _value(left, point), _value(right, point)
            if op == "/" and not b:
                raise Undecided("division by zero")
            if op == "-" and a == 0:
                return -b
            result = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
            if has(tree, "∞"):
                return numbers.mpc(result)
        case ("^", left, right):
            a, b = _value(left, point), _value(right, point)
            if abs(b) > LARGEST or abs(a) > numbers.mpf(10) ** LARGEST:
                raise Undecided("power")
            result = numbers.power(a, b)
        case ("call", name, *arguments):
            result = _called(name, [_value(argument, point) for argument in arguments])
        case _:
            raise Undecided(tree[0])
    if not abs(result) < numbers.mpf(10) ** 1000:
        raise Undecided("too large")
    return numbers.mpc(result)


def _called(name: str, arguments: Sequence[Any]) -> Any:
    numbers = context()
    if any(abs(argument) > LARGEST for argument in arguments) and name not in ("sqrt", "abs", "log", "ln", "lg"):
        raise Undecided("argument")
    x = arguments[0]
    match name, len(arguments):
        case (("log" | "ln"), 1):
            return numbers.log(x)
        case "log", 2:
            return numbers.log(x) / numbers.log(arguments[1])
        case "lg", 1:
            return numbers.log(x) / numbers.log(10)
        case "sqrt", 2:
            return numbers.root(x, int(arguments[1].real)) if x.imag or x.real >= 0 else _odd_root(x, arguments[1])
        case "abs", 1:
            return abs(x)
        case (("floor" | "ceil" | "factorial" | "binom"), _):
            return getattr(numbers, {"binom": "binomial"}.get(name, name))(*arguments)
    return getattr(numbers, name)(x)


def _odd_root(x: Any, degree: Any) -> Any:
    """The real odd root of a negative number, as taught in school: the cube root of −8 is −2."""
    if degree.real % 2 != 1:
        return context().root(x, int(degree.real))
    return -context().root(-x, int(degree.real))
