"""Plan of reinforcement learning with groups of sampled answers (GRPO).

A step is rollout, rewards, training, and weights for the engine; in a run with stale rollouts, idle time too.

A rollout ends with its longest answers: while the batch shrinks, a step of decoding costs almost as much for few
sequences as for many. Lengths are log-normal, cut at a limit, and their mean grows along the run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import calibration_of
from rorqual.plan.chips import Chip
from rorqual.plan.cost import flops_per_token, parameters
from rorqual.plan.inference import SIZES, Instance, smallest_instance
from rorqual.plan.layout import Job
from rorqual.plan.published_runs import Calibration
from rorqual.plan.search import Found, search
from rorqual.plan.stage import Estimate, StagePlan
from rorqual.plan.step_time import LINK_SHARE, pipeline_times
from rorqual.plan.training_plan import said

SPREAD = 0.8  # standard deviation of the logarithm of an answer's length
RL_SPREAD = 0.35  # of the logarithm of a step's time, beside the calibration: lengths and engines differ (runs of verl)
POINTS = 48  # along an answer, and 3 along a run
SWITCH_SECONDS = 10.0  # of a synchronous step: caches freed and taken, weights handed over, batches collected


@dataclass(frozen=True)
class Tuning:
    """What is asked about an RL run."""

    config: ModelConfig
    chip: Chip
    chips: int
    steps: int  # rollouts
    questions: int = 32  # of a rollout
    samples: int = 16  # of a question
    prompt: float = 200.0
    mean: tuple[float, float] = (1000.0, 4000.0)  # tokens of an answer, at the start and at the end
    limit: float = 8192.0
    spread: float = SPREAD
    reference: bool = True  # whether a KL loss needs a reference model's log-probabilities
    old: bool = True  # whether log-probabilities of the sampled tokens are computed anew
    reward_seconds: float = 0.0  # of an answer, on one core
    cores: int = 64
    stale: bool = False  # whether rollouts and training run at the same time, on halves of the chips
    precision: str = "bfloat16"
    weights: str = "bfloat16"  # of rollouts
    price: float | None = None
    name: str = ""

    @property
    def answers(self) -> int:
        return self.questions * self.samples


@dataclass(frozen=True)
class StepParts:
    """Seconds of a step; they add up to it."""

    rollout: float
    tail: float  # the part of the rollout in which less than half of the answers are still being written
    rewards: float
    log_probabilities: float
    training: float
    weights: float  # to the engine
    idle: float  # of chips that wait for the others

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def plan_rl(asked: Tuning) -> StagePlan:
    """Raises UserError where the training or the engine does not fit."""
    fitted = calibration_of(asked.chip)
    trained = _layout(asked, fitted)
    engine = _engine(asked, fitted)
    along = [0.0, 0.5, 1.0]
    parts = [_step(asked, trained, engine, asked.mean[0] + x * (asked.mean[1] - asked.mean[0])) for x in along]
    names = list(vars(parts[0]))
    # Simpson's rule along the run.
    whole = {
        name: asked.steps * sum(w * getattr(p, name) for w, p in zip((1, 4, 1), parts, strict=True)) / 6
        for name in names
    }
    seconds = sum(whole.values())
    both = Calibration(fitted.utilisation, math.hypot(fitted.spread, RL_SPREAD), fitted.source)
    mean = sum(asked.mean) / 2
    tokens = asked.steps * asked.answers * mean
    return StagePlan(
        kind="rl",
        name=asked.name,
        config=asked.config,
        chip=asked.chip,
        chips=asked.chips,
        price=asked.price if asked.price is not None else asked.chip.price,
        tokens=tokens,
        flops_per_token=flops_per_token(asked.config, round(asked.prompt + mean)),
        seconds=Estimate(seconds, *both.interval(seconds)),
        parts=whole,
        memory={name: size for name, size in vars(trained.memory).items() if size},
        layout=trained.layout,
        times=pipeline_times(_job(asked), trained.layout, asked.chip, fitted.utilisation),
        micro_batches=trained.layout.micro_batches(_job(asked).batch),
        assumptions=(
            f"answers of {asked.mean[0]:g} tokens on average at the start and {asked.mean[1]:g} at the end, at most "
            f"{asked.limit:g}, log-normal with σ = {asked.spread:g}",
            f"rollouts on {asked.chips // engine.chips // (1 + asked.stale)} × {engine.chips} chips in {asked.weights}",
            f"trained as {said(trained.layout)}",
            "interval: the spread of published training runs and ± 35 % for lengths and engines",
        ),
        figures={
            "steps": asked.steps,
            "answers_a_step": asked.answers,
            "seconds_a_step": {"start": parts[0].total, "middle": parts[1].total, "end": parts[2].total},
            "parts_at_the_end": vars(parts[2]),
            "rollout_tokens_per_second_chip": asked.answers * asked.mean[1]
            / (parts[2].rollout + parts[2].tail) / (asked.chips / (1 + asked.stale)),
        },
    )  # fmt: skip


def _layout(asked: Tuning, fitted: Calibration) -> Found:
    """The fastest for sequences of the run's middle."""
    chips = _half(asked)
    found = search(_job(asked), asked.chip, chips, fitted.utilisation, precisions=(asked.precision,), count=1)
    if not found.best:
        raise UserError(
            f"the training does not fit on {chips} × {asked.chip.name}; give more --gpus, or chips with more memory"
        )
    return found.best[0]


def _engine(asked: Tuning, fitted: Calibration) -> Instance:
    """The fewest chips that hold the model and two answers of full length."""
    most, tokens = _half(asked), 2 * (asked.prompt + asked.limit)
    found = smallest_instance(asked.config, asked.chip, most, asked.weights, fitted.utilisation, tokens)
    if found is None:
        raise UserError(
            f"the engine does not fit on {most} × {asked.chip.name}; give more --gpus, smaller --weights or chips with "
            "more memory"
        )
    return found


def _step(asked: Tuning, trained: Found, engine: Instance, mean: float) -> StepParts:
    """At a point of the run at which answers have so many tokens on average."""
    instances = max(1, _half(asked) // engine.chips)
    body, tail = rollout_seconds(
        engine, instances, asked.answers, asked.prompt, mean, asked.limit, asked.spread
    )  # fmt: skip
    tokens = asked.answers * (asked.prompt + mean)
    training = trained.time.total * tokens / _job_tokens(asked)
    passes = (asked.old + asked.reference) * training / 3
    rewards = asked.answers * asked.reward_seconds / asked.cores
    size = SIZES[asked.weights] * parameters(asked.config)[0]
    rate = asked.chip.between if asked.chips > asked.chip.per_node else asked.chip.within
    weights = SWITCH_SECONDS + size / engine.chips / (LINK_SHARE * rate)
    if not asked.stale:
        return StepParts(body, tail, rewards, passes, training, weights, 0.0)
    there, here = body + tail + rewards, passes + training + weights
    # Each half of the chips waits for the other; half of the step is the work of each.
    idle = abs(there - here) / 2
    return StepParts(body / 2, tail / 2, rewards / 2, passes / 2, training / 2, weights / 2, idle)


def _job(asked: Tuning) -> Job:
    length, batch = _shape(asked)
    return Job(asked.config, length, batch, ahead=False)


def _job_tokens(asked: Tuning) -> float:
    """Of the step that the layout was found for."""
    length, batch = _shape(asked)
    return length * batch


def _shape(asked: Tuning) -> tuple[int, int]:
    """Tokens of a sequence and sequences of a step."""
    chips = _half(asked)
    length = 1 << max(8, math.ceil(math.log2(asked.prompt + sum(asked.mean) / 2)))
    return length, max(chips, asked.answers // chips * chips)


def _half(asked: Tuning) -> int:
    """Chips that train, and as many that sample."""
    return asked.chips // 2 if asked.stale and asked.chips > 1 else asked.chips


def rollout_seconds(
    engine: Instance, instances: int, answers: float, prompt: float, mean: float, limit: float, spread: float = SPREAD
) -> tuple[float, float]:
    """Seconds until `answers` are written on so many instances: (most of them, the rest, while less than half are
    open). All wait for the longest, which one instance writes alone.

    Where the caches do not hold all, answers wait for a place, and all but the last places are full all the time.
    """
    # Answers that are open at the same time need their prompt and, on average, half of what they will have.
    own = answers / instances
    places = min(own, max(1.0, engine.cache_tokens() / (prompt + mean)))
    lengths = Lengths(prompt, mean, limit, spread)
    body, tail = writing_seconds(engine.decode_seconds, answers, own, places, lengths)
    return own * engine.prefill_seconds(prompt) + body, tail


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: log-normal with this spread of the logarithm, cut at the limit."""

    prompt: float
    mean: float  # after the cut
    limit: float
    spread: float = SPREAD


def writing_seconds(
    decode: Callable[[float, float], float], answers: float, own: float, places: float, lengths: Lengths
) -> tuple[float, float]:
    """As `rollout_seconds`, without prefill, of an engine that writes `own` of all answers, so many at once.

    decode: seconds of a step for a batch with so many tokens of context on average.
    """
    prompt, mean = lengths.prompt, lengths.mean
    survival = survivors(mean, lengths.limit, lengths.spread)
    body = tail = 0.0
    if places < own:
        body = (own - places) / places * mean * decode(places, prompt + mean / 2)
    for (start, alive), (end, next_alive) in pairwise(survival):
        middle = (alive + next_alive) / 2
        if answers * alive < 0.5:
            break
        part = (end - start) * decode(max(places * middle, 1.0), prompt + (start + end) / 2)
        if middle > 0.5:
            body += part
        else:
            tail += part
    return body, tail


def survivors(mean: float, limit: float, spread: float) -> list[tuple[float, float]]:
    """(tokens, share of answers that are longer), from 0 to the limit; their mean is `mean` after the cut."""
    if not 0 < mean <= limit:
        raise UserError(f"answers of {mean:g} tokens on average with at most {limit:g}: give a mean within the limit")
    if mean > 0.98 * limit:
        return [(0.0, 1.0), (limit, 1.0)]
    low, high = math.log(mean) - spread**2 / 2, math.log(limit) + 6 * spread
    for _ in range(60):  # the median before the cut
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, limit, spread) < mean else (low, middle)
    points = [limit * (i / POINTS) ** 3 for i in range(POINTS + 1)]  # closer where most answers end
    return [(t, 1.0 if t == 0 else _longer(t, low, spread)) for t in points]


def _longer(tokens: float, log_median: float, spread: float) -> float:
    return 0.5 * math.erfc((math.log(tokens) - log_median) / spread / math.sqrt(2))


def _cut_mean(log_median: float, limit: float, spread: float) -> float:
    """Of min(length, limit) of a log-normal length."""
    z = (math.log(limit) - log_median) / spread
    inside = math.exp(log_median + spread**2 / 2) * 0.5 * math.erfc(-(z - spread) / math.sqrt(2))
    return inside + limit * 0.5 * math.erfc(z / math.sqrt(2))
