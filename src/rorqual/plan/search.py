"""The fastest layouts of a training step that fit in memory.

A layout's time has a bound that needs no simulation; layouts are tried in its order until no other can be among the
best, so the result is that of trying all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from rorqual.plan.chips import Chip
from rorqual.plan.cost import Memory
from rorqual.plan.layout import Job, Layout, check, memory_by_rank
from rorqual.plan.step_time import IMBALANCE, StepTime, least_seconds, step_time

USABLE = 0.92  # of a chip's memory; the rest is for libraries, messages and fragmentation
PIPELINES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (1, 2, 4, 8)  # ranks that share a sequence, in one node
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "v3", "full")


@dataclass(frozen=True)
class Found:
    layout: Layout
    time: StepTime
    memory: Memory  # of the rank with the most


@dataclass(frozen=True)
class Search:
    best: tuple[Found, ...]  # the fastest first; none if nothing fits
    nearest: tuple[Layout, Memory] | None  # where nothing fits, the layout that needs the least; None: none is possible
    tried: int  # layouts that are possible, whether or not they fit
    fitting: int


def search(
    job: Job, chip: Chip, chips: int, utilisation: float, *, precisions: tuple[str, ...] = ("bfloat16",),
    count: int = 5, imbalance: float = IMBALANCE, only: Layout | None = None,
) -> Search:  # fmt: skip
    """The `count` fastest layouts on so many chips; `only`: this one, if it fits."""
    room = USABLE * chip.memory
    bounds: list[tuple[float, Layout, Memory]] = []
    nearest: tuple[Layout, Memory] | None = None
    tried = 0
    for layout in [only] if only else layouts(job, chips, chip.per_node, precisions):
        if check(layout, job) is not None:
            continue
        tried += 1
        most = max(memory_by_rank(job, layout), key=lambda m: m.total)
        if nearest is None or most.total < nearest[1].total:
            nearest = layout, most
        if most.total <= room:
            bounds.append((least_seconds(job, layout, chip, utilisation, imbalance), layout, most))
    bounds.sort(key=lambda found: found[0])
    best: list[Found] = []
    for least, layout, most in bounds:
        if len(best) == count and least >= best[-1].time.total:
            break
        best.append(Found(layout, step_time(job, layout, chip, utilisation, imbalance), most))
        best.sort(key=lambda found: found.time.total)
        del best[count:]
    return Search(tuple(best), None if best else nearest, tried, len(bounds))


def layouts(job: Job, chips: int, per_node: int, precisions: tuple[str, ...]) -> Iterator[Layout]:
    """Those worth trying; not all of them are possible."""
    experts = job.config.moe.n_routed_experts if job.config.n_routed_experts else 1
    contexts = (1,) if job.length <= 8192 else CONTEXTS
    for pipeline, context in product(PIPELINES, contexts):
        if chips % (pipeline * context) or pipeline > job.config.num_hidden_layers:
            continue
        data = chips // pipeline // context
        if job.batch % data:
            continue
        shares = [n for n in _powers(data * context) if experts % n == 0]
        schedules = ("1f1b", "dualpipev") if pipeline > 1 else ("1f1b",)
        shardings = ("zero-1",) if pipeline > 1 else ("zero-1", "full")
        for share, schedule, sharding, micro_batch, precision, recompute in product(
            shares, schedules, shardings, MICRO_BATCHES, precisions, RECOMPUTE
        ):
            dispatch = "two-hop-fp8" if precision == "fp8" else "two-hop"
            yield Layout(
                pipeline=pipeline, data=data, context=context, experts=share, per_node=per_node,
                micro_batch=micro_batch, schedule=schedule, sharding=sharding, dispatch=dispatch,
                precision=precision, recompute=recompute,
            )  # fmt: skip


def _powers(most: int) -> list[int]:
    """Powers of two that divide `most`."""
    found = [1]
    while most % (2 * found[-1]) == 0:
        found.append(2 * found[-1])
    return found
