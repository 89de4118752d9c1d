"""Sampled answers to a task's problems, as they are scored, kept in a file and summarised."""

from dataclasses import dataclass, fields
from typing import Any

from rorqual.evals.benchmarks.benchmark import Parts
from rorqual.rl.envs.environment import Problem


@dataclass(frozen=True)
class Sample:
    """One completion and its verdict."""

    text: str
    opening: str  # the end of the prompt that belongs to the answer's thinking; "" for none
    tokens: int
    finish_reason: str  # "stop", or "length" of a truncated one
    answer: str | None  # that it votes for
    correct: bool
    parts: Parts  # published metrics beside pass@1: (points, out of how many)
    # Of an episode of several turns, whose last one is `text`:
    turns: int | None = None  # of the model
    messages: list[dict[str, Any]] | None = None  # all after the prompt's; calls are in them as the model wrote them

    @property
    def whole(self) -> str:
        """The completion with the tag that the prompt opened."""
        return self.opening + self.text


@dataclass
class Collected:
    """Problems and their samples: sample i is of problem i // (samples per problem)."""

    problems: list[Problem]
    prompts: list[str]
    samples: list[Sample]

    @property
    def per_problem(self) -> int:
        return len(self.samples) // len(self.problems)

    def __add__(self, other: "Collected") -> "Collected":
        return Collected(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})
