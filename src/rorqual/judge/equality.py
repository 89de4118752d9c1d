"""Equality of `algebra` trees: exact for rational numbers, else by values at a few fixed points.

Two expressions that agree to 35 digits at points chosen independently of them are equal (Schwartz–Zippel).
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rorqual.judge.algebra import Tree, number
from rorqual.judge.numeric import Undecided, context, exactly, free_names, has, near, values

SIX = 6  # significant digits from which a decimal may be the rounding of a number without a finite decimal
FLOAT = 15  # significant digits from which a decimal is a rounded floating-point number


def equal(a: Tree, b: Tree) -> bool:
    """Lists without brackets and sets are unordered; (…) and […] are ordered, and intervals keep their ends."""
    first, second = _solutions(a), _solutions(b)
    if first[0] != second[0]:
        first, second = _interval(first), _interval(second)
    match first[0], second[0]:
        case "list", "list":
            return _same_lists(first, second)
        case "relation", "relation":
            return _same_relations(first, second)
        case "union", "union":
            return _matched(first[1], second[1])
        case kind, other if {kind, other} & {"list", "relation", "union"}:
            return False
    return same_scalars(first, second)


def _solutions(tree: Tree) -> Tree:
    """Without "x =" before values, with ± expanded, and with several assignments as a mapping."""
    items = tree[2] if tree[0] == "list" and tree[1] == "" else [tree]
    names = [_assigned(item) for item in items]
    if all(names) and len(set(names)) == len(names) > 1:
        ordered = sorted(zip(names, items, strict=True), key=lambda pair: pair[0] or "")
        return ("list", "=", [item for _, item in ordered])
    if names[0] and len(items) > 1 and all(name in (None, names[0]) for name in names):
        items = [item[1][-1] if name else item for name, item in zip(names, items, strict=True)]
    if any(has(item, "±") for item in items):
        split = [_signed(item, sign) if has(item, "±") else item for item in items for sign in "+-"]
        items = [item for i, item in enumerate(split) if i % 2 == 0 or item is not split[i - 1]]
    if len(items) > 1:
        return ("list", "", items)
    one = items[0]
    return one if one[0] != "list" or one[1] != "{}" or len(one[2]) != 1 else one[2][0]


def _assigned(item: Tree) -> str | None:
    if item[0] == "relation" and item[2] == ["="]:
        left = item[1][0]
        if left[0] == "name" and left[1] not in ("π", "∞"):
            return left[1]
        if left[0] == "*" and left[1][0] == left[2][0] == "name" and left[1][1] in ("f", "g", "h"):
            return f"{left[1][1]}({left[2][1]})"  # f(x) = …
    return None


def _signed(tree: Any, sign: str) -> Any:
    if tree in ("±", "∓"):
        return sign if tree == "±" else "-" if sign == "+" else "+"
    return type(tree)(_signed(part, sign) for part in tree) if isinstance(tree, tuple | list) else tree


def without_name(tree: Tree) -> Tree:
    """The value of an assignment, or of a true equation of numbers (6*7 = 42); other trees unchanged."""
    tree = _solutions(tree)
    if tree[0] == "relation" and set(tree[2]) == {"="}:
        sides = tree[1][1:] if tree[1][0][0] == "name" else tree[1]
        if not free_names(sides) and len(sides) > 1 and all(same_scalars(side, sides[-1]) for side in sides):
            return sides[-1]
    if tree[0] == "list" and tree[1] == "=":
        return ("list", "()", [item[1][-1] for item in tree[2]])
    return tree[1][-1] if _assigned(tree) and _scalar(tree[1][-1]) else tree


def _scalar(tree: Tree) -> bool:
    return tree[0] not in ("list", "relation", "union")


def _same_lists(a: Tree, b: Tree) -> bool:
    (_, left, first), (_, right, second) = a, b
    if left == right == "{}":
        return all(any(equal(x, y) for y in second) for x in first) and all(
            any(equal(x, y) for x in first) for y in second
        )
    if len(first) != len(second):
        return False
    if {left, right} <= {"", "{}"}:
        return _matched(first, second)
    alike = left == right or "" in (left, right) or ({left, right} == {"()", "[]"} and len(first) > 2)
    return alike and "{}" not in (left, right) and all(map(equal, first, second))


def _matched(first: Sequence[Tree], second: Sequence[Tree]) -> bool:
    left = list(second)
    for x in first:
        found = next((i for i, y in enumerate(left) if equal(x, y)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _interval(tree: Tree) -> Tree:
    """An inequality in one variable as an interval: 0 <= x < 1 → [0, 1)."""
    if tree[0] == "list" and tree[1] == "":
        parts = [_interval(item) for item in tree[2] if item[0] == "relation"]
        whole = len(parts) == len(tree[2]) and all(part[0] == "list" for part in parts)
        return ("union", parts) if whole else tree
    if tree[0] != "relation":
        return tree
    _, sides, signs = tree
    if signs[0][0] == ">":
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if len({sign[0] for sign in signs}) != 1 or signs[0][0] != "<":
        return tree
    infinite = ("name", "∞")
    if len(sides) == 2 and sides[0][0] == "name":
        sides, signs = [("-", number(0), infinite), *sides], ["<", *signs]
    elif len(sides) == 2 and sides[1][0] == "name":
        sides, signs = [*sides, infinite], [*signs, "<"]
    if len(sides) != 3 or sides[1][0] != "name":
        return tree
    return ("list", "(["[signs[0] == "<="] + ")]"[signs[1] == "<="], [sides[0], sides[2]])


def _same_relations(a: Tree, b: Tree) -> bool:
    first, second = _interval(a), _interval(b)
    if first[0] == second[0] == "list":
        return free_names(a) == free_names(b) and _same_lists(first, second)
    (_, left, signs), (_, right, others) = _rising(a), _rising(b)
    if signs != others:
        return False
    if len(left) == 2:
        one, two = ("-", left[0], left[1]), ("-", right[0], right[1])
        return _proportional(one, two, positive=signs[0] not in ("=", "!="))
    return all(map(same_scalars, left, right))


def _rising(relation: Tree) -> Tree:
    _, sides, signs = relation
    if signs[0][0] == ">":
        return ("relation", sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]])
    return relation


def _proportional(a: Tree, b: Tree, positive: bool) -> bool:
    """Whether a = c·b for a constant c ≠ 0; c > 0 where `positive`."""
    ratios = []
    for x, y in values([a, b]):
        if near(x, 0) != near(y, 0):
            return False
        if not near(x, 0):
            ratios.append(x / y)
    if not ratios or not all(near(ratio, ratios[0]) for ratio in ratios):
        return False
    return not positive or (near(ratios[0].imag, 0) and ratios[0].real > 0)


def same_scalars(a: Tree, b: Tree) -> bool:
    """Exact for rational numbers; a decimal of six or more digits also equals a number that it is the rounding of."""
    if not (_scalar(a) and _scalar(b)):
        return a[0] == b[0] and equal(a, b)
    first, second = exactly(a), exactly(b)
    if first is not None and second is not None:
        if first == second:
            return True
        if max(_digits(a) or 0, _digits(b) or 0) >= FLOAT:
            return abs(first - second) <= abs(first) / 10**12
        return _rounds(first, second, _digits(b)) or _rounds(second, first, _digits(a))
    try:
        pairs = values([a, b])
    except Undecided:
        return a == b
    if not free_names(a) and not free_names(b):
        x, y = pairs[0]
        for value, decimal, d in ((x, second, _digits(b)), (y, first, _digits(a))):
            if decimal is not None and d is not None and near(value.imag, 0) and _rounds(value.real, decimal, d):
                return True
    return all(near(x, y) for x, y in pairs)


def _digits(tree: Tree) -> int | None:
    """Significant digits of a decimal, possibly with a minus and a power of ten; None for other trees."""
    match tree:
        case ("num", _, digits):
            return digits
        case ("-", ("num", 0, None), inner):
            return _digits(inner)
        case ("*", inner, ("^", ("num", 10, None), _)):
            return _digits(inner)
    return None


def _rounds(value: Any, decimal: Fraction, digits: int | None) -> bool:
    """Whether `decimal` is `value` rounded to `digits`; only for values without a finite decimal."""
    if digits is None or digits < SIX or not decimal:
        return False
    if isinstance(value, Fraction):
        rest = value.denominator
        for factor in (2, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return False
    magnitude = math.floor(math.log10(abs(decimal.numerator)) - math.log10(decimal.denominator) + 1e-12)
    half = Fraction(10) ** (magnitude - digits + 1) / 2
    if isinstance(value, Fraction):
        return abs(value - decimal) <= half
    numbers = context()
    return (
        abs(value - numbers.mpf(decimal.numerator) / decimal.denominator)
        <= numbers.mpf(half.numerator) / half.denominator
    )
