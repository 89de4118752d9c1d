"""Plan of a training: pre-training or SFT, on the fastest layout that fits, or on a given one."""

import math
from dataclasses import asdict, dataclass

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import HERE, calibration_of
from rorqual.plan.chips import Chip
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.plan.layout import Job, Layout, check
from rorqual.plan.published_runs import Calibration
from rorqual.plan.quantity import quantity
from rorqual.plan.search import USABLE, Search, search
from rorqual.plan.stage import DAY, Estimate, Rejected, StagePlan
from rorqual.plan.step_time import IMBALANCE, StepTime, pipeline_times

LENGTH = 4096
MOST_CHIPS = 1 << 17


@dataclass(frozen=True)
class Question:
    """What is asked about a training."""

    config: ModelConfig
    chip: Chip
    tokens: float
    chips: int | None = None  # None: the fewest that it fits on and, with `days`, that are fast enough
    length: int = LENGTH
    batch: int | None = None  # sequences of a step; None: by the compute of the run
    precision: str = "bfloat16"
    moments: str = "float32"
    price: float | None = None
    days: float | None = None
    imbalance: float = IMBALANCE
    kind: str = "pretrain"
    name: str = ""
    layout: Layout | None = None  # None: the fastest that fits


def plan_training(asked: Question) -> StagePlan:
    """Raises UserError where nothing fits, with what is missing."""
    if asked.tokens <= 0:
        raise UserError(f"--tokens {asked.tokens:g}: must be above 0")
    config, chip, fitted = asked.config, asked.chip, calibration_of(asked.chip)
    if chip.family == HERE:
        return _here(asked)
    chips, searched = _searched(asked, fitted)
    found, *others = searched.best
    job = _job(asked, chips)
    steps = asked.tokens / (job.batch * job.length)
    time = found.time
    low, high = fitted.interval(time.total * steps)
    assumptions = [
        f"{fitted.utilisation:.0%} of {quantity(chip.rate(found.layout.precision), 'FLOP/s')} in products, "
        f"{fitted.source}; interval: the spread of published runs of {chip.family}",
        f"{job.batch} sequences of {job.length} tokens a step" + ("" if asked.batch else
        ", by the run's compute (DeepSeek LLM, arXiv 2401.02954, eq. 1)"),
        f"the busiest expert has {asked.imbalance:.0%} more tokens than the mean",
        f"parameters: BF16 weights, FP32 masters and gradients, two {asked.moments} moments",
    ]  # fmt: skip
    return StagePlan(
        kind=asked.kind,
        name=asked.name,
        config=config,
        chip=chip,
        chips=chips,
        price=asked.price if asked.price is not None else chip.price,
        tokens=asked.tokens,
        flops_per_token=_flops(config, job.length),
        seconds=Estimate(time.total * steps, low, high),
        parts={part: seconds * steps for part, seconds in vars(time).items()},
        memory=asdict(found.memory),
        layout=found.layout,
        times=pipeline_times(job, found.layout, chip, fitted.utilisation, asked.imbalance),
        micro_batches=found.layout.micro_batches(job.batch),
        rejected=tuple(Rejected(o.layout, o.time.total, _why(time, o.time)) for o in others),
        assumptions=tuple(assumptions),
        figures={
            "steps": steps,
            "seconds_a_step": time.total,
            "tokens_per_second": job.batch * job.length / time.total,
        },
    )


def _here(asked: Question) -> StagePlan:
    from rorqual.plan.this_machine import training_here  # needs torch, which other plans do not wait for

    batch = asked.batch or batch_of(asked, 1)
    found = training_here(
        asked.config, asked.kind, asked.name, asked.tokens, asked.length, batch, asked.moments, asked.price
    )
    if asked.days is not None and found.seconds.value > asked.days * DAY:
        raise UserError(
            f"--days {asked.days:g}: this machine needs {found.seconds.value / DAY:.3g}; allow more days, or train on "
            "fewer tokens"
        )
    return found


def _flops(config: ModelConfig, length: int) -> float:
    return flops_per_token(config, length) + mtp_flops_per_token(config, length)


def _job(asked: Question, chips: int) -> Job:
    return Job(
        asked.config, asked.length, asked.batch or batch_of(asked, chips), moments=asked.moments,
    )  # fmt: skip


def batch_of(asked: Question, chips: int) -> int:
    """Sequences of a step that suit the run's compute, a multiple of the chips or, of fewer, a power of two."""
    compute = asked.tokens * flops_per_token(asked.config, asked.length)
    sequences = max(1.0, 0.292 * compute**0.3271 / asked.length)
    if sequences >= chips:
        return chips * max(1, round(sequences / chips))
    return 1 << round(math.log2(sequences))


def _searched(asked: Question, fitted: Calibration) -> tuple[int, Search]:
    chip, searched = asked.chip, None
    precisions = (asked.precision,)
    counts = [asked.chips] if asked.chips is not None else _counts()
    for chips in counts:
        if chips < counts[-1] and not _could_be(asked, fitted, chips):
            continue
        job = _job(asked, chips)
        searched = search(
            job, chip, chips, fitted.utilisation, precisions=precisions, imbalance=asked.imbalance, only=asked.layout
        )
        if searched.best and (asked.chips is not None or _fast_enough(asked, job, searched)):
            return chips, searched
    assert searched is not None
    if searched.best:
        raise UserError(
            f"--days {asked.days:g}: too few even for {counts[-1]} × {chip.name}; allow more days, or train on fewer "
            "tokens"
        )
    raise UserError(_does_not_fit(asked, counts[-1], searched))


def _fast_enough(asked: Question, job: Job, searched: Search) -> bool:
    seconds = searched.best[0].time.total * asked.tokens / (job.batch * job.length)
    return asked.days is None or seconds <= asked.days * DAY


def _could_be(asked: Question, fitted: Calibration, chips: int) -> bool:
    """Whether so many chips end in time if they do nothing but products."""
    rate = chips * asked.chip.rate(asked.precision) * fitted.utilisation
    return asked.days is None or asked.tokens * _flops(asked.config, asked.length) / rate <= asked.days * DAY


def _counts() -> list[int]:
    """Powers of two."""
    found = [1]
    while found[-1] < MOST_CHIPS:
        found.append(2 * found[-1])
    return found


def _does_not_fit(asked: Question, chips: int, searched: Search) -> str:
    chip, room = asked.chip, USABLE * asked.chip.memory
    if asked.layout is not None and (why := check(asked.layout, _job(asked, chips))):
        return f"the layout is not possible: {why}; change the recipe's [parallel]"
    if searched.nearest is None:
        return (
            f"no layout of {chips} chips suits {asked.length} tokens a sequence and the batch; choose another number "
            "of --gpus or another --batch"
        )
    layout, memory = searched.nearest
    parts = {name: size for name, size in asdict(memory).items() if size}
    largest = max(parts, key=parts.__getitem__)
    remedy = {
        "activations": "a shorter --context",
        "weights": "more --gpus",
        "gradients": "more --gpus",
        "masters": "more --gpus",
        "moments": "more --gpus, or --moments bfloat16",
    }.get(largest, "more --gpus")
    return (
        f"the model does not fit on {chips} × {chip.name}: the layout that needs the least ({said(layout)}) needs "
        f"{quantity(memory.total, 'B')} a chip, {quantity(memory.total - room, 'B')} more than there is, of which "
        f"{quantity(parts[largest], 'B')} are {largest}; try {remedy}, or chips with more memory"
    )


def _why(best: StepTime, other: StepTime) -> str:
    """The part in which a layout loses the most."""
    more = {part: seconds - vars(best)[part] for part, seconds in vars(other).items()}
    part = max(more, key=more.__getitem__)
    names = {
        "products": "products", "attention": "attention", "memory": "memory traffic", "tensor": "sums in a layer",
        "launches": "launching kernels", "travel": "tokens on their way to experts", "bubble": "bubble",
        "sums": "sums over ranks", "update": "update",
    }  # fmt: skip
    return f"{more[part]:+.2g} s of {names[part]} a step"


def said(layout: Layout) -> str:
    """Such as "pipeline 16, data 128, experts 64, dualpipev, zero-1, recompute v3"."""
    sizes = [f"{name} {n}" for name in ("pipeline", "data", "context", "experts", "tensor")
             if (n := getattr(layout, name)) > 1]  # fmt: skip
    more = [layout.schedule] if layout.pipeline > 1 else []
    more += [f"micro-batch {layout.micro_batch}", layout.sharding, f"recompute {layout.recompute}"]
    return ", ".join([*(sizes or ["1 chip"]), *more])
