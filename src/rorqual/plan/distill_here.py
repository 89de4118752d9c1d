"""Predict the cost of a distillation on this machine: the answers, then fine-tuning on those that are kept."""

import math

from rorqual.kernels.dtypes import compute_dtype
from rorqual.model.config import ModelConfig
from rorqual.plan.engine_time import engine_costs_here
from rorqual.plan.request import DistillRequest
from rorqual.plan.rl_here import sampling_seconds
from rorqual.plan.rl_plan import Lengths

BATCH = 64  # problems of a sampling call


def answers_seconds(asked: DistillRequest, teacher: ModelConfig) -> float:
    """Of all answers, `asked.answer` tokens on average: so many calls one after the other, each until its last one."""
    engine = engine_costs_here(compute_dtype("auto"))
    lengths = Lengths(asked.prompt, min(asked.answer, asked.limit), asked.limit)
    calls = asked.problems / BATCH
    problems = min(asked.problems, float(BATCH))
    answers = problems * asked.samples
    return max(1.0, calls) * sum(sampling_seconds(teacher, engine, problems, answers, answers, lengths))


def training_rows(asked: DistillRequest, sequence_length: int) -> int:
    """Sequences of an epoch, packed; without those of [[mix]]."""
    examples = asked.problems * asked.correct * min(asked.keep, asked.samples)
    return max(1, math.ceil(examples * (asked.prompt + asked.answer) / sequence_length))
