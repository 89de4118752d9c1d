"""Which layers a pipeline stage has."""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from rorqual.errors import UserError
from rorqual.model import ModelConfig
from rorqual.plan.cost import active_after_layers, active_by_layer
from rorqual.plan.schedule import Schedule

V = TypeVar("V", int, tuple[int, ...])
SLACK = 1.02  # of the most expensive rank's cost, so that stages are more alike


def split(costs: Sequence[int], stages: int, after: int = 0) -> tuple[range, ...]:
    """The layers of each stage, in order, at least one.

    The most expensive stage costs as little as possible, then the next, and so on; where that leaves a choice, earlier
    stages, which hold more activations, have fewer layers. costs: of each layer; after: of what follows the last.
    """
    sums = [0, *accumulate(costs)]
    # By the number of layers in the stages so far: their costs, highest first, and where each ends.
    best: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {0: ((), ())}
    for stage in range(1, stages + 1):
        more = after if stage == stages else 0
        best = {
            end: min(
                (tuple(sorted((*spent, sums[end] - sums[start] + more), reverse=True)), (*ends, end))
                for start, (spent, ends) in best.items()
                if start < end
            )
            for end in range(stage, len(costs) - (stages - stage) + 1)
        }
    ends = best[len(costs)][1]
    return tuple(map(range, (0, *ends), ends))


@functools.cache
def split_v(costs: tuple[int, ...], ranks: int, after: int = 0) -> tuple[range, ...]:
    """As `split` for a V, of which rank r has stages r and 2·ranks − 1 − r, and what matters is their sum.

    The most expensive rank costs at most 2 % more than it has to. Where `split` would make it cost more, the first
    stage, with the embedding, and the last may have no layers: V3's have none on 16 ranks.
    """
    parts = split(costs, 2 * ranks, after)
    cost = [sum(costs[i] for i in part) for part in parts]
    cost[-1] += after
    worst = max(cost[rank] + cost[-1 - rank] for rank in range(ranks))
    most, _ = _best_v(costs, ranks, after, worst, 0, lambda value, a, b: max(value, a + b))
    if worst <= SLACK * most:
        return parts
    start: tuple[int, ...] = ()
    _, ends = _best_v(costs, ranks, after, SLACK * most, start, lambda v, a, b: tuple(sorted((*v, a, b), reverse=True)))
    edges = [0, *(front for front, _ in ends), *(len(costs) - back for _, back in reversed(ends[:-1])), len(costs)]
    return tuple(map(range, edges, edges[1:]))


def _best_v(
    costs: Sequence[int], ranks: int, after: int, most: float, start: V, grow: Callable[[V, int, int], V]
) -> tuple[V, tuple[tuple[int, int], ...]]:
    """The least value of a split in which no rank costs more than `most`, and how many layers of the front and of the
    back are taken after each rank.

    grow: a rank's value, from that of the ranks before and the costs of its two stages.
    """
    n, sums = len(costs), [0, *accumulate(costs)]
    best: dict[tuple[int, int], tuple[V, tuple[tuple[int, int], ...]]] = {(0, 0): (start, ())}
    for rank in range(ranks):
        least, more, left = min(rank, 1), 0 if rank else after, ranks - 1 - rank
        found: dict[tuple[int, int], tuple[V, tuple[tuple[int, int], ...]]] = {}
        for (front, back), (value, ends) in best.items():
            for f in range(front + least, n - 2 * left - back - least + 1):
                first = sums[f] - sums[front]
                if first + more > most:
                    break
                for b in range(back + least, n - 2 * left - f + 1):
                    last = sums[n - back] - sums[n - b] + more
                    if first + last > most:
                        break
                    if sums[n - b] - sums[f] <= left * most:  # what is left fits
                        new = grow(value, first, last), (*ends, (f, b))
                        found[f, b] = min(new, found.get((f, b), new))
        best = found
    return min(best.values())


def layers_of_stages(config: ModelConfig, schedule: Schedule) -> tuple[range, ...]:
    """Balanced by the parameters that a token is multiplied with. Raises UserError for fewer layers than stages."""
    if config.num_hidden_layers < schedule.stages:
        other = " or choose schedule 1f1b" if schedule.stages > schedule.ranks else ""
        raise UserError(
            f"parallel.pipeline = {schedule.ranks}: schedule {schedule.name} needs {schedule.stages} stages of at "
            f"least one layer, and the model has {config.num_hidden_layers} layers; lower parallel.pipeline{other}"
        )
    costs, after = tuple(active_by_layer(config)), active_after_layers(config)
    if schedule.stages > schedule.ranks:
        return split_v(costs, schedule.ranks, after)
    return split(costs, schedule.stages, after)
