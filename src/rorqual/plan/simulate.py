"""How long a pipeline schedule takes, from the times of its actions."""

from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.plan.schedule import Schedule, Step

Seconds = float | Sequence[float]  # for every stage, or one for each


@dataclass(frozen=True)
class Times:
    """Seconds of a stage's actions. FB: of an overlapped pair, by the stage of its forward; None: no faster than F + B.
    link: of a transfer between two ranks, during which both may compute."""

    F: Seconds
    B: Seconds
    I: Seconds  # noqa: E741
    W: Seconds
    FB: Seconds | None = None
    link: float = 0.0

    def of(self, step: Step) -> float:
        """Seconds of a step."""
        if len(step) == 2 and self.FB is not None:
            return _at(self.FB, step[0].stage)
        return sum(_at(getattr(self, action.kind), action.stage) for action in step)


@dataclass(frozen=True)
class Timeline:
    spans: tuple[tuple[tuple[float, float], ...], ...]  # start and end of each step, per rank, in seconds

    @property
    def length(self) -> float:
        """Seconds from the first start to the last end."""
        return max(end for spans in self.spans for _, end in spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Seconds without work, per rank: length − busy time."""
        length = self.length
        return tuple(length - sum(end - start for start, end in spans) for spans in self.spans)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time without work."""
        return sum(self.bubble) / (len(self.spans) * self.length)


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """The schedule with each step as early as its rank and what it needs allow.

    Raises ValueError where a sequence of times has another length than the stages, or ranks wait for ever.
    """
    for name in ("F", "B", "I", "W", "FB"):
        value = getattr(times, name)
        if isinstance(value, Sequence) and len(value) != schedule.stages:
            raise ValueError(f"{schedule.name} has {schedule.stages} stages, and {len(value)} times {name} were given")
    ends: list[float] = []  # of steps, in the schedule's order
    spans: list[list[tuple[float, float]]] = [[] for _ in range(schedule.ranks)]
    for rank, step, waits in schedule.waits:
        start = spans[rank][-1][1] if spans[rank] else 0.0
        for number, elsewhere in waits:
            start = max(start, ends[number] + times.link * elsewhere)
        ends.append(start + times.of(step))
        spans[rank].append((start, ends[-1]))
    return Timeline(tuple(map(tuple, spans)))


def _at(seconds: Seconds, stage: int) -> float:
    return seconds[stage] if isinstance(seconds, Sequence) else seconds
