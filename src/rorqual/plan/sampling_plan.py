"""Plans of sampling answers: an evaluation, and a distillation, which trains a student on a teacher's best answers."""

import math
from dataclasses import dataclass, replace

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import calibration_of
from rorqual.plan.chips import Chip
from rorqual.plan.inference import Instance, smallest_instance
from rorqual.plan.published_runs import Calibration
from rorqual.plan.rl_plan import RL_SPREAD, SPREAD, rollout_seconds
from rorqual.plan.stage import Estimate, StagePlan
from rorqual.plan.training_plan import Question, plan_training

MOST_CHIPS = 512  # of an engine, where nobody says how many


@dataclass(frozen=True)
class Sampling:
    """What is asked about answers to problems."""

    config: ModelConfig
    chip: Chip
    problems: float
    samples: int  # of a problem
    chips: int | None = None  # None: the fewest that hold the model
    prompt: float = 500.0
    answer: float = 500.0  # tokens on average
    limit: float = 8192.0
    weights: str = "bfloat16"
    price: float | None = None
    name: str = ""
    kind: str = "eval"

    @property
    def answers(self) -> float:
        return self.problems * self.samples


def plan_sampling(asked: Sampling) -> StagePlan:
    """Raises UserError where the model does not fit."""
    calibrated = calibration_of(asked.chip)
    engine = _engine(asked, calibrated)
    chips = asked.chips or engine.chips
    instances = chips // engine.chips
    body, tail = rollout_seconds(
        engine, instances, asked.answers, asked.prompt, asked.answer, asked.limit, SPREAD
    )  # fmt: skip
    seconds = body + tail
    both = Calibration(calibrated.utilisation, math.hypot(calibrated.spread, RL_SPREAD), calibrated.source)
    open_at_a_time = min(asked.answers / instances, engine.cache_tokens() / (asked.prompt + asked.answer))
    cache = open_at_a_time * (asked.prompt + asked.answer) * engine.cache_bytes / engine.chips
    return StagePlan(
        kind=asked.kind,
        name=asked.name,
        config=asked.config,
        chip=asked.chip,
        chips=chips,
        price=asked.price if asked.price is not None else asked.chip.price,
        tokens=asked.answers * asked.answer,
        flops_per_token=0.0,
        seconds=Estimate(seconds, *both.interval(seconds)),
        parts={"rollout": body, "tail": tail},
        memory={"weights": engine.weight_bytes(), "KV cache": cache},
        assumptions=(
            f"{asked.samples} answers to each of {asked.problems:g} problems, of {asked.answer:g} tokens on average "
            f"and at most {asked.limit:g}, log-normal with σ = {SPREAD:g}",
            f"{instances} × {engine.chips} chips in {asked.weights}",
            "interval: the spread of published training runs and ± 35 % for lengths and engines",
        ),
        figures={"answers": asked.answers, "tokens_per_second": asked.answers * asked.answer / seconds},
    )


def plan_distillation(teacher: Sampling, student: Question, keep: int, correct: float, epochs: float) -> StagePlan:
    """The teacher's answers, then training on at most `keep` of each problem, where some are correct.

    `student.tokens` is computed. Raises UserError where one of them does not fit.
    """
    sampled = plan_sampling(teacher)
    examples = teacher.problems * correct * min(keep, teacher.samples)
    tokens = epochs * examples * (teacher.prompt + teacher.answer)
    trained = plan_training(replace(student, tokens=tokens, chips=student.chips or sampled.chips, kind="sft"))
    chips = max(sampled.chips, trained.chips)
    if sampled.chips != trained.chips:
        raise UserError(f"sampling is on {sampled.chips} chips and training on {trained.chips}; say --gpus {chips}")
    ends = zip(vars(sampled.seconds).items(), vars(trained.seconds).values(), strict=True)
    return replace(
        trained,
        kind="distill",
        name=student.name,
        seconds=Estimate(**{name: a + b for (name, a), b in ends}),
        parts={"sampling": sampled.seconds.value, **trained.parts},
        rejected=(),
        assumptions=(
            f"the teacher's answers: {sampled.assumptions[0]}; {sampled.assumptions[1]}",
            f"{examples:g} of them are trained on, {epochs:g} times",
            *trained.assumptions,
        ),
        figures={**trained.figures, "sampled_tokens": sampled.tokens},
    )


def trained_for(plan: StagePlan, seconds: float) -> StagePlan:
    """A distillation's plan where the student is trained by the clock, for so many seconds."""
    sampled = plan.parts["sampling"]
    factor = seconds / (sum(plan.parts.values()) - sampled)
    ends = {name: sampled * value / plan.seconds.value + seconds for name, value in vars(plan.seconds).items()}
    figures = {name: value * factor if name == "steps" else value for name, value in plan.figures.items()}
    return replace(
        plan,
        tokens=plan.tokens * factor,
        seconds=Estimate(**ends),
        parts={name: value if name == "sampling" else value * factor for name, value in plan.parts.items()},
        assumptions=(plan.assumptions[0], f"the student is trained for {seconds:g} s", *plan.assumptions[2:]),
        figures=figures,
    )


def _engine(asked: Sampling, calibrated: Calibration) -> Instance:
    most, tokens = asked.chips or MOST_CHIPS, asked.prompt + asked.limit
    found = smallest_instance(asked.config, asked.chip, most, asked.weights, calibrated.utilisation, tokens)
    if found is None:
        raise UserError(
            f"the model does not fit on {most} × {asked.chip.name} with an answer of {asked.limit:g} tokens; give more "
            "--gpus, smaller --weights or chips with more memory"
        )
    return found
