"""Which rank computes nonsense: each one's own loss and gradient, before sums over ranks, beside the others'.

It costs a read of a rank's FP32 gradients a step, and 12 bytes to each other rank in a message that is sent anyway.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.parallel.mesh import Mesh
from rorqual.train.objective import Objective
from rorqual.train.optimizer import Optimizer
from rorqual.train.spikes import robust

# Both must be exceeded: ranks with other tokens differ by chance, but a rank whose weights, memory or data are wrong by
# a factor. With two ranks only the factor says anything.
FACTOR, DEVIATIONS = 3.0, 6.0


@dataclass(frozen=True)
class RankReport:
    """What one rank computed in a step, of its own tokens."""

    finite: bool  # its loss
    stage: int  # rank of the pipeline
    loss: float  # nats per token; 0 where another stage has it, or the rank has too few tokens to compare
    grad_norm: float  # of the mean over its tokens; 0 for too few, and of a single process


def gather_reports(
    mesh: Mesh, micro_batches: Sequence[Batch], objective: Objective, optimizer: Optimizer
) -> tuple[list[RankReport], Tensor]:
    """Every rank's report, and the step's losses [1 + MTP depths], summed over all ranks."""
    norm = optimizer.own_norm() if mesh.section.processes > 1 else 0.0
    share = sum(float(batch.weights.double().sum()) for batch in micro_batches) / objective.totals[0]
    own = [float(objective.finite), mesh.pipeline.place, norm, share, *objective.sums.tolist()]
    found = torch.stack(mesh.world.gather(torch.tensor(own), "losses"))
    reports: list[RankReport] = []
    for finite, stage, norm, share, loss, *_ in found.tolist():
        # The mean over few tokens has a larger gradient by chance: below half of an equal share, nothing is compared.
        scale = 1 / share if share * mesh.tokens.size > 0.5 else 0.0
        reports.append(RankReport(bool(finite), int(stage), loss * scale, norm * scale))
    return reports, found[:, 4:].sum(0)


def not_finite(reports: Sequence[RankReport]) -> tuple[int, ...]:
    """Ranks whose loss is not finite; where all losses are, those whose gradient is not."""
    found = tuple(rank for rank, report in enumerate(reports) if not report.finite)
    return found or tuple(rank for rank, report in enumerate(reports) if not math.isfinite(report.grad_norm))


def far_off(reports: Sequence[RankReport]) -> dict[int, str]:
    """Rank → what of it is far off from the ranks of its stage, as part of a sentence.

    Of two ranks only the higher one is named: what is wrong is larger, more often than smaller.
    """
    stages: defaultdict[int, list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        stages[report.stage].append(rank)
    out: dict[int, str] = {}
    for ranks in stages.values():
        for name in ("loss", "gradient norm"):
            own = {r: reports[r].loss if name == "loss" else reports[r].grad_norm for r in ranks}
            known = {rank: value for rank, value in own.items() if value and math.isfinite(value)}
            for rank, middle in _outliers(known).items():
                out.setdefault(
                    rank, f"rank {rank} alone has a {name} of {own[rank]:.4g}, where the median of its {len(known)} "
                    f"ranks is {middle:.4g}, as in the step before; look at its machine and its data",
                )  # fmt: skip
    return out


def _outliers(values: Mapping[int, float]) -> dict[int, float]:
    """Those far off, with the median."""
    if not values:
        return {}
    middle, deviation = robust(values.values(), median_low)
    return {
        rank: middle
        for rank, value in values.items()
        if not middle / FACTOR <= value <= middle * FACTOR and abs(value - middle) > DEVIATIONS * deviation
    }


class RankWatch:
    """Names what lasts: a rank that is far off in two steps in a row, once.

    A few tokens are far off by chance (with 64 a rank, in 1 % of the steps), but not again; a fault is.
    """

    def __init__(self) -> None:
        self.in_a_row: dict[int, int] = {}  # steps, by rank

    def new(self, reports: Sequence[RankReport]) -> list[str]:
        """A sentence on each rank that was far off in the step before, and is again."""
        found = far_off(reports)
        self.in_a_row = {rank: self.in_a_row.get(rank, 0) + 1 for rank in found}
        return [found[rank] for rank, steps in self.in_a_row.items() if steps == 2]
