"""Costs of counted work, fitted to measured times by least squares with coefficients ≥ 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from rorqual.plan.published_runs import Z80

LEAST_SPREAD = 0.05
EXPECTED_WEIGHT = 0.1


@dataclass(frozen=True)
class Fitted:
    """Seconds of one of each count, in fields with the counts' names; and the spread of the logarithm of a time around
    their sum."""

    spread: float = field(kw_only=True)
    source: str = field(kw_only=True)

    def seconds(self, counts: Any) -> float:
        return sum(getattr(self, name) * value for name, value in vars(counts).items())

    def interval(self, seconds: float) -> tuple[float, float]:
        """80 % around it."""
        return interval(seconds, self.spread)


FittedT = TypeVar("FittedT", bound=Fitted)


def interval(value: float, spread: float) -> tuple[float, float]:
    """80 % around a value whose logarithm has this standard deviation."""
    factor = math.exp(Z80 * spread)
    return value / factor, value * factor


def fit(
    measured: Sequence[tuple[Any, float]], source: str, kind: type[FittedT], expected: Mapping[str, float] | None = None
) -> FittedT:
    """The costs with the least squared relative errors, from pairs of counts and seconds.

    expected: costs to stay near to where the measurements do not tell one cost from another: larger models than those
    measured are predicted, in which another part counts. A cost of twice what is expected weighs as much as an error
    of `EXPECTED_WEIGHT`.
    """
    names = list(vars(measured[0][0]))
    # A relative error of each: rows are divided by the time.
    rows = torch.tensor([[getattr(c, n) / t for n in names] for c, t in measured], dtype=torch.float64)
    ones = torch.ones(len(measured), dtype=torch.float64)
    unit = 1 / rows.max(0).values.clamp(min=1e-300)
    if expected is not None:
        unit = torch.tensor([expected[n] for n in names], dtype=torch.float64)
    rows = rows * unit
    near = torch.eye(len(names), dtype=torch.float64)[: 0 if expected is None else None] * EXPECTED_WEIGHT
    found = _not_negative(torch.cat([rows, near]), torch.cat([ones, near.sum(1)]))
    errors = (rows @ found).clamp(min=1e-9).log()
    free = max(1, len(measured) - int((found > 0).sum()))
    spread = max(LEAST_SPREAD, math.sqrt(float((errors**2).sum()) / free))
    return kind(**dict(zip(names, (found * unit).tolist(), strict=True)), spread=spread, source=source)


def _not_negative(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares with coefficients ≥ 0, by Lawson and Hanson's active set."""
    count = rows.shape[1]
    active = torch.zeros(count, dtype=torch.bool)
    found = torch.zeros(count, dtype=rows.dtype)
    for _ in range(3 * count):
        gradient = rows.T @ (target - rows @ found)
        gradient[active] = -1
        if float(gradient.max()) < 1e-10 or bool(active.all()):
            break
        active[int(gradient.argmax())] = True
        while True:
            tried = torch.zeros_like(found)
            tried[active] = torch.linalg.lstsq(rows[:, active], target).solution
            if bool((tried[active] > 0).all()):
                found = tried
                break
            below = active & (tried <= 0)
            step = float((found[below] / (found[below] - tried[below])).min())
            found = found + step * (tried - found)
            active &= found > 1e-12
            found[~active] = 0
    return found
