"""Figures of sampled answers: pass@1, cons@k and pass@k with bootstrap intervals, published metrics, verdicts.

Shapes: P problems, S samples per problem.
"""

import hashlib
import re
from collections.abc import Callable

import numpy as np

from rorqual.evals.collected import Collected
from rorqual.evals.results import Metric, Scores, TaskResult
from rorqual.evals.stats import cons_at_k, interval, pass_at_1, pass_at_k, ratio_interval
from rorqual.rl.envs.environment import Problem
from rorqual.rl.rewards import RIGHT, WRONG, self_verified

MARKED = re.compile(f"([^{RIGHT}{WRONG}]*)([{RIGHT}{WRONG}])")

# Whether a line that the model marked ✓ is correct; None where the line is not a candidate.
LineChecker = Callable[[Problem, str], bool | None]


def summarise(
    collected: Collected,
    k: int | None = None,
    seed: int = 0,
    check_line: LineChecker | None = None,
    split: str | None = None,
    judge: str = "",
    attempts: int = 1,
) -> TaskResult:
    """The results of one task, as in `evaluate`; arguments as there.

    judge: in a few words. attempts: of a benchmark whose published score allows so many; pass@k with this k is then
    among its metrics, where there are as many samples.
    """
    problems = collected.problems
    scores = _TaskScores(collected, k, seed, check_line, attempts)
    levels = sorted({problem.difficulty for problem in problems} - {""}, key=_natural)
    indices = np.arange(len(problems))
    by_difficulty = {
        level: scores.summary(indices[[problem.difficulty == level for problem in problems]]) for level in levels
    }
    return TaskResult(
        **vars(scores.summary(indices)),
        by_difficulty=by_difficulty,
        questions_hash=hashlib.sha256("\0".join(p.question for p in problems).encode()).hexdigest(),
        scores=pass_at_1(scores.correct).tolist(),
        split=split,
        judge=judge,
    )


class _TaskScores:
    """Scores of a task's completions [P, S], to be summarised over any subset of the problems."""

    def __init__(
        self, collected: Collected, k: int | None, seed: int, check_line: LineChecker | None, attempts: int
    ) -> None:
        problems, samples, each = collected.problems, collected.per_problem, collected.samples
        shape = (len(problems), samples)
        self.correct = np.array([s.correct for s in each], dtype=bool).reshape(shape)  # [P, S], as all below
        self.answers = np.array([s.answer for s in each], dtype=object).reshape(shape)
        self.tokens = np.array([s.tokens for s in each]).reshape(shape)
        self.truncated = np.array([s.finish_reason == "length" for s in each]).reshape(shape)
        self.verified = np.zeros(shape, dtype=bool)  # the last mark is ✓
        self.marked = np.zeros(shape, dtype=int)  # lines marked ✓ that can be judged
        self.marked_correct = np.zeros(shape, dtype=int)  # the correct ones among them
        for i, sample in enumerate(each):
            at = divmod(i, samples)
            verdicts = read_verdicts(sample.text)
            self.verified[at] = self_verified(sample.text)
            if check_line is None:
                judged = [self.correct[at]] if self.verified[at] else []
            else:
                judged = [check_line(problems[at[0]], text) for text, positive in verdicts if positive]
                judged = [correct for correct in judged if correct is not None]
            self.marked[at], self.marked_correct[at] = len(judged), sum(judged)
        self.k, self.seed, self.attempts = k or samples, seed, attempts
        # Of each published metric: points and out of how many, each [P, S, 2].
        names = dict.fromkeys(name for sample in each for name in sample.parts)
        self.parts = {n: np.array([s.parts.get(n, (0, 0)) for s in each]).reshape(*shape, 2) for n in names}

    def summary(self, chosen: np.ndarray) -> Scores:
        """All results of the problems with indices `chosen`."""
        correct, answers = self.correct[chosen], self.answers[chosen]
        marked = int(self.marked[chosen].sum())
        first, any_of = pass_at_1(correct), pass_at_k(correct, self.k)
        votes = any(answer is not None for answer in self.answers.flat)
        agreed = cons_at_k(answers[:, : self.k].tolist(), correct[:, : self.k]) if votes else None
        return Scores(
            problems=len(chosen),
            k=self.k,
            pass_at_1=float(first.mean()),
            interval=interval(first, self.seed),
            cons_at_k=None if agreed is None else float(agreed.mean()),
            cons_interval=None if agreed is None else interval(agreed, self.seed),
            pass_at_k=float(any_of.mean()),
            pass_k_interval=interval(any_of, self.seed),
            mean_tokens=float(self.tokens[chosen].mean()),
            truncated_share=float(self.truncated[chosen].mean()),
            answered_share=float(np.mean(answers != None)) if votes else None,  # noqa: E711 (elementwise)
            verified_share=float(self.verified[chosen].mean()),
            verdict_precision=int(self.marked_correct[chosen].sum()) / marked if marked else None,
            metrics=self._metrics(chosen),
        )

    def _metrics(self, chosen: np.ndarray) -> dict[str, Metric]:
        """The published metrics beside pass@1 of the problems with indices `chosen`."""
        metrics: dict[str, Metric] = {}
        for name, parts in self.parts.items():
            points, most = parts[chosen].sum(axis=1, dtype=float).T  # [P] each
            if most.sum():
                metrics[name] = Metric(float(points.sum() / most.sum()), ratio_interval(points, most, self.seed))
        if 1 < self.attempts <= self.correct.shape[1]:
            best = pass_at_k(self.correct[chosen], self.attempts)
            metrics[f"pass@{self.attempts}"] = Metric(float(best.mean()), interval(best, self.seed))
        return metrics


def read_verdicts(text: str) -> list[tuple[str, bool]]:
    """The candidates that the model marked before `</think>`: (text of the line before the mark, whether ✓)."""
    thinking = text.partition("</think>")[0]
    return [(before.rpartition("\n")[2].strip(), mark == RIGHT) for before, mark in MARKED.findall(thinking)]


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key that orders numbers by value: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
