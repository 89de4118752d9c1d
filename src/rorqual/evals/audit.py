"""`rorqual eval --audit`: how often a second judge disagrees with the one that scored the answers."""

import random
from typing import Protocol, runtime_checkable

from rorqual.evals.collected import Collected
from rorqual.evals.results import Audit, Disagreement
from rorqual.evals.tasks import Task, Verdicts

DRAWN = 20  # disagreements of a task that are shown
END = 300  # characters of a reply that are shown


@runtime_checkable
class Audited(Protocol):
    """A task with a second judge."""

    second_judge: str
    second_score: Verdicts


def audit(task: Task, collected: Collected, seed: int, drawn: int = DRAWN) -> Audit | None:
    """Judge the finished answers a second time; None for a task without a second judge.

    The shown disagreements are drawn by the seed. Truncated answers are left out, since no judge sees an answer there.
    """
    if not isinstance(task, Audited):
        return None
    each = collected.per_problem
    chosen = [i for i, sample in enumerate(collected.samples) if sample.finish_reason == "stop"]
    problems, samples = [collected.problems[i // each] for i in chosen], [collected.samples[i] for i in chosen]
    verdicts = task.second_score(problems, [s.whole for s in samples], [s.answer for s in samples])
    differing = [
        Disagreement(p.question, p.answer, s.answer, s.text.strip()[-END:], s.correct)
        for p, s, second in zip(problems, samples, verdicts, strict=True)
        if s.correct != second
    ]
    first = sum(found.correct for found in differing)
    shown = differing if len(differing) <= drawn else random.Random(seed).sample(differing, drawn)
    return Audit(task.judge, task.second_judge, len(chosen), first, len(differing) - first, shown)
