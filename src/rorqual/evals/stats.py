"""Estimators of pass@1, pass@k and cons@k, and bootstrap intervals over problems.

Shapes: P problems, S samples per problem, R bootstrap resamples. All fractions are in [0, 1].
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from rorqual.judge.judge import number_in

RESAMPLES = 2000


def pass_at_1(correct: np.ndarray) -> np.ndarray:
    """Mean over samples: correct [P, S] → [P] (R1, "Evaluation")."""
    return np.asarray(correct, dtype=float).mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k samples drawn without replacement is correct: correct [P, S] → [P].

    Unbiased estimator 1 − C(n−c, k) / C(n, k), as a product (Codex paper, arXiv 2107.03374, §2.1).
    Raises ValueError unless 1 ≤ k ≤ S.
    """
    correct = np.asarray(correct, dtype=bool)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} must be between 1 and the {n} samples")
    wrong = n - correct.sum(axis=1, keepdims=True)  # [P, 1]
    drawn = np.arange(k)  # probability that draw i is wrong, given that all before were
    return 1.0 - np.prod(np.maximum(wrong - drawn, 0) / (n - drawn), axis=1)


def cons_at_k(answers: Sequence[Sequence[str | None]], correct: np.ndarray) -> np.ndarray:
    """Majority vote among each problem's k samples: answers and correct [P, k] → [P].

    Answers are compared in canonical form; None does not vote, and a problem without votes scores 0. On a tie, the
    value is the expectation over a uniformly random choice among the leading answers (R1, "Evaluation").
    """
    values = np.zeros(len(answers))
    for p, (row, right) in enumerate(zip(answers, np.asarray(correct, dtype=float), strict=True)):
        votes: Counter[str] = Counter()
        rights: Counter[str] = Counter()
        for answer, ok in zip(row, right, strict=True):
            if answer is not None:
                key = canonical(answer)
                votes[key] += 1
                rights[key] += ok
        if votes:
            most = max(votes.values())
            leaders = [key for key, count in votes.items() if count == most]
            values[p] = sum(rights[key] / most for key in leaders) / len(leaders)
    return values


def interval(values: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap of the mean over problems: values [P] → (low, high). Raises ValueError without values."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one problem")
    picks = np.random.default_rng(seed % 2**64).integers(len(values), size=(resamples, len(values)))  # [R, P]
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_interval(points: np.ndarray, most: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The same of Σ points / Σ most, both [P]: where problems count by what they hold (IFEval's instructions)."""
    picks = np.random.default_rng(seed % 2**64).integers(len(points), size=(RESAMPLES, len(points)))  # [R, P]
    low, high = np.quantile(points[picks].sum(axis=1) / np.maximum(most[picks].sum(axis=1), 1), [0.025, 0.975])
    return float(low), float(high)


def paired_difference(before: np.ndarray, after: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Gain between two stages on the same problems, both [P]: (mean, low, high).

    The bootstrap resamples problems and keeps pairs together, so that a problem's difficulty cancels.
    Raises ValueError when the lengths differ.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape:
        raise ValueError(f"paired stages need the same problems, not {len(before)} and {len(after)}")
    gain = after - before
    return float(gain.mean()), *interval(gain, seed)


def canonical(answer: str) -> str:
    """Normalised answer for voting: spaces, case, number format, order of terms and factors."""
    if (number := number_in(answer)) is not None:
        return number
    text = " ".join(answer.split()).strip("$ ").removesuffix(".")
    arithmetic = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    arithmetic = arithmetic.replace("×", "*").replace("·", "*").replace("÷", "/").replace("−", "-")
    if len(arithmetic) <= 200 and re.fullmatch(r"[\d\s.+\-*/()]+", arithmetic):
        try:
            return _ordered(ast.parse(arithmetic.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return text.casefold()


def _ordered(node: ast.expr) -> str:
    """An expression with the terms of sums and the factors of products sorted, and numbers as fractions."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return str(Fraction(str(number)))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return str(-Fraction(str(number)))
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _ordered(inner)
        case ast.UnaryOp() | ast.BinOp(op=ast.Add() | ast.Sub()):
            return "(" + "".join(sorted(_parts(node, ast.Add, ast.Sub, "+", "-"))) + ")"
        case ast.BinOp(op=ast.Mult() | ast.Div()):
            return "(" + "".join(sorted(_parts(node, ast.Mult, ast.Div, "*", "/"))) + ")"
    raise ValueError("not arithmetic")


def _parts(node: ast.expr, plus: type, minus: type, keep: str, flip: str, sign: bool = True) -> list[str]:
    """The signed terms of a sum (or factors of a product), with brackets expanded."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, plus | minus):
            right_sign = sign if isinstance(op, plus) else not sign
            return _parts(left, plus, minus, keep, flip, sign) + _parts(right, plus, minus, keep, flip, right_sign)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if plus is ast.Add:
            return _parts(operand, plus, minus, keep, flip, not sign)
    return [(keep if sign else flip) + _ordered(node)]
