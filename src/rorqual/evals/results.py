"""What an evaluation found. `to_dict` of each class is what `rorqual eval --json` and summary.json hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rorqual.errors import UserError
from rorqual.evals.stats import paired_difference

Interval = tuple[float, float]  # 95 %, by bootstrap over problems


@dataclass(frozen=True)
class Metric:
    """A metric that a benchmark is published with, beside pass@1; in [0, 1]."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Scores:
    """Of some problems. Fractions are in [0, 1]; None: nothing to compute it from."""

    problems: int
    k: int
    pass_at_1: float
    interval: Interval
    cons_at_k: float | None  # majority vote of the first k samples
    cons_interval: Interval | None
    pass_at_k: float  # over all draws of k samples
    pass_k_interval: Interval
    mean_tokens: float  # of a completion
    truncated_share: float
    answered_share: float | None
    verified_share: float  # completions whose last mark before `</think>` is ✓
    verdict_precision: float | None  # correct among lines marked ✓
    metrics: dict[str, Metric] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class TaskResult(Scores):
    """Of one task."""

    by_difficulty: dict[str, Scores]
    questions_hash: str  # of the questions without their prompt templates
    scores: list[float]  # [P] pass@1 of each problem
    split: str | None = None  # "all": a whole file or benchmark
    judge: str = ""  # what decides whether an answer is right
    unasked: int = 0  # problems of a benchmark that the context does not hold; they count as unfinished

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return found if self.split else {name: value for name, value in found.items() if name != "split"}


@dataclass(frozen=True)
class Disagreement:
    """An answer that two judges judge differently."""

    question: str
    reference: str
    answer: str | None
    reply: str  # its end
    correct: bool  # by the benchmark's judge; the second one says the opposite


@dataclass(frozen=True)
class Audit:
    """Of a task's finished answers: how often a second judge disagrees."""

    judge: str
    second_judge: str
    answers: int
    only_first: int  # correct by the benchmark's judge alone
    only_second: int
    drawn: list[Disagreement]  # some of them, by the seed

    @property
    def share(self) -> float:
        """Of the finished answers, those that the judges disagree on; 0 where there is none."""
        return (self.only_first + self.only_second) / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`, and its settings."""

    tasks: dict[str, TaskResult]
    samples: int
    k: int
    seed: int
    split: str
    template: str
    temperature: float
    top_p: float
    max_tokens: int
    thinking_budget: int | None
    seconds: float
    audits: dict[str, Audit] = field(default_factory=dict)  # of the tasks that have a second judge, where asked for

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for name, audit in self.audits.items():
            found["audits"][name]["share"] = audit.share
        return found if self.audits else {name: value for name, value in found.items() if name != "audits"}


@dataclass(frozen=True)
class Gain:
    """Difference of pass@1 between two results, paired by problem."""

    gain: float
    interval: Interval


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy with thinking ended by force after `budget` tokens."""

    budget: int
    pass_at_1: float
    interval: Interval
    mean_tokens: float


def compare(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult], seed: int = 0) -> dict[str, Gain]:
    """Gain of pass@1 in each task that both results have. Raises UserError where they are of different problems."""
    gains: dict[str, Gain] = {}
    for name in (name for name in after if name in before):
        old, new = before[name], after[name]
        if old.questions_hash != new.questions_hash:
            raise UserError(f"task {name}: the two results are of different problems; evaluate with the same seed")
        gain, low, high = paired_difference(np.array(old.scores), np.array(new.scores), seed)
        gains[name] = Gain(gain, (low, high))
    return gains
