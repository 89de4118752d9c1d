"""`rorqual eval`: sample answers to held-out problems; pass@1, cons@k and pass@k with bootstrap intervals.

Shapes: P problems, S samples per problem.
"""

import functools
import hashlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.results import CurvePoint, Evaluation, Scores, TaskResult
from rorqual.evals.stats import cons_at_k, interval, pass_at_1, pass_at_k
from rorqual.evals.tasks import EnvironmentTask, Task, TaskLike, open_task
from rorqual.rl.envs.environment import Problem, Split
from rorqual.rl.prompts import Template
from rorqual.rl.rewards import RIGHT, WRONG, self_verified

TEMPERATURE, TOP_P = 0.6, 0.95  # R1's sampling for evaluation (R1, "Evaluation")
MARKED = re.compile(f"([^{RIGHT}{WRONG}]*)([{RIGHT}{WRONG}])")

# Whether a line that the model marked ✓ is correct; None where the line is not a candidate.
LineChecker = Callable[[Problem, str], bool | None]


def evaluate(
    engine: Engine,
    tasks: Sequence[TaskLike],
    samples: int = 8,
    problems: int = 200,
    *,
    k: int | None = None,
    seed: int = 0,
    template: Template = "chat",
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    max_tokens: int = 1024,
    thinking_budget: int | None = None,
    split: Split = "test",
    check_line: LineChecker | None = None,
    quiet: bool = False,
) -> Evaluation:
    """pass@1, cons@k and pass@k of each task, with 95% bootstrap intervals over problems.

    tasks: names as on the command line, recipe sections, environments or `Task`s. k (default: `samples`): cons@k is the
    majority vote of the first k samples, pass@k is over all draws of k. A truncated completion has no answer.
    `verdict_precision` counts the lines marked ✓ that `check_line` can judge, without it the last one by the final
    answer. Raises UserError, before anything is sampled, for an unknown task, too few problems, a question longer than
    the context, invalid sampling parameters, or model code that cannot be isolated.
    """
    params = sampling_params(
        samples, problems, seed=seed, template=template, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
        thinking_budget=thinking_budget,
    )  # fmt: skip
    if k is not None and not 1 <= k <= samples:
        raise UserError(f"k = {k}: must be between 1 and samples = {samples}")
    opened = [open_task(task, split) for task in tasks]
    names = [task.name for task in opened]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"task {duplicates[0]} is given twice; remove one")
    tokenizer = engine.require_tokenizer()
    started, results = time.monotonic(), dict[str, TaskResult]()
    drawn = [task.problems(problems, seed) for task in opened]
    for task, chosen in zip(opened, drawn, strict=True):
        for problem in chosen:
            try:
                engine.check([tokens_of(engine, task.prompt(problem, tokenizer, template), template)], params)
            except UserError as e:
                raise UserError(f"{problem.where or f'task {task.name}'}: {e}") from None
    with _progress(quiet) as bar:
        for task, chosen in zip(opened, drawn, strict=True):
            line = bar.add_task(task.name, total=len(chosen) * samples)
            advance = functools.partial(bar.advance, line)
            found = collect(engine, task, chosen, params, template, advance)
            results[task.name] = summarise(found, k, seed, check_line, task.split)
    return Evaluation(
        tasks=results,
        samples=samples,
        k=k or samples,
        seed=seed,
        split=split,
        template=template,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        thinking_budget=thinking_budget,
        seconds=time.monotonic() - started,
    )


def sampling_params(samples: int, problems: int, template: Template = "chat", **settings: Any) -> SamplingParams:
    """The sampling parameters among the arguments of `evaluate`. Raises UserError for invalid ones."""
    if samples < 1 or problems < 1:
        raise UserError(f"samples = {samples}, problems = {problems}: both must be at least 1")
    if template not in get_args(Template):
        raise UserError(f"template = {template!r}: must be one of {', '.join(get_args(Template))}")
    return SamplingParams(n=samples, **settings)


def thinking_curve(engine: Engine, task: TaskLike, budgets: Sequence[int], **options: Any) -> list[CurvePoint]:
    """Accuracy by thinking budget: `</think>` is forced after that many thinking tokens.

    options: of `evaluate`. The points are in order of budget, and of the same problems.
    """
    opened = open_task(task, options.get("split", "test"))
    curve: list[CurvePoint] = []
    for budget in sorted(budgets):
        found = evaluate(engine, [opened], thinking_budget=budget, **options).tasks[opened.name]
        curve.append(CurvePoint(budget, found.pass_at_1, found.interval, found.mean_tokens))
    return curve


@dataclass
class Collected:
    """Problems and their completions: completion i, with its answer and score, is of problem i // samples."""

    problems: list[Problem]
    prompts: list[str]
    completions: list[Completion]
    answers: list[str | None]
    correct: list[bool]

    def __add__(self, other: "Collected") -> "Collected":
        return Collected(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def collect(
    engine: Engine,
    task: Task,
    problems: list[Problem],
    params: SamplingParams,
    template: Template,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """Sample `params.n` completions per problem and score them; `progress` receives counts of completions."""
    tokenizer = engine.require_tokenizer()
    prompts = [task.prompt(problem, tokenizer, template) for problem in problems]
    if isinstance(task, EnvironmentTask) and task.grades_episodes:
        played = task.play(engine, problems, params, template)
        if progress:
            progress(len(played[0]))
        return Collected(problems, prompts, *played)
    encoded = [tokens_of(engine, prompt, template) for prompt in prompts]
    completions = engine.generate(encoded, params, progress=progress)
    repeated = [problem for problem in problems for _ in range(params.n)]
    openings = [engine.opening(prompt) for prompt in encoded]
    texts = [openings[i // params.n] + c.text for i, c in enumerate(completions)]
    answers = [
        task.answer(repeated[i], prompts[i // params.n], texts[i]) if c.finish_reason == "stop" else None
        for i, c in enumerate(completions)
    ]
    correct = task.score(repeated, texts, answers)
    return Collected(problems, prompts, completions, answers, correct)


def tokens_of(engine: Engine, prompt: str, template: Template) -> Sequence[int]:
    """Token ids of a task's prompt; BOS is added unless a chat template has rendered it."""
    return engine.encode(prompt, begin=template != "chat" or not getattr(engine.tokenizer, "chat_template", None))


def summarise(
    collected: Collected,
    k: int | None = None,
    seed: int = 0,
    check_line: LineChecker | None = None,
    split: str | None = None,
) -> TaskResult:
    """The results of one task, as in `evaluate`; arguments as there."""
    problems = collected.problems
    scores = _TaskScores(collected, k, seed, check_line)
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
    )


class _TaskScores:
    """Scores of a task's completions [P, S], to be summarised over any subset of the problems."""

    def __init__(self, collected: Collected, k: int | None, seed: int, check_line: LineChecker | None) -> None:
        problems, samples = collected.problems, len(collected.completions) // len(collected.problems)
        shape = (len(problems), samples)
        completions = collected.completions
        self.correct = np.array(collected.correct, dtype=bool).reshape(shape)  # [P, S], as all below
        self.answers = np.array(collected.answers, dtype=object).reshape(shape)
        self.tokens = np.array([len(c.tokens) for c in completions]).reshape(shape)
        self.truncated = np.array([c.finish_reason == "length" for c in completions]).reshape(shape)
        self.verified = np.zeros(shape, dtype=bool)  # the last mark is ✓
        self.marked = np.zeros(shape, dtype=int)  # lines marked ✓ that can be judged
        self.marked_correct = np.zeros(shape, dtype=int)  # the correct ones among them
        for i, completion in enumerate(completions):
            at = divmod(i, samples)
            verdicts = read_verdicts(completion.text)
            self.verified[at] = self_verified(completion.text)
            if check_line is None:
                judged = [self.correct[at]] if self.verified[at] else []
            else:
                judged = [check_line(problems[at[0]], text) for text, positive in verdicts if positive]
                judged = [correct for correct in judged if correct is not None]
            self.marked[at], self.marked_correct[at] = len(judged), sum(judged)
        self.k, self.seed = k or samples, seed

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
        )


def read_verdicts(text: str) -> list[tuple[str, bool]]:
    """The candidates that the model marked before `</think>`: (text of the line before the mark, whether ✓)."""
    thinking = text.partition("</think>")[0]
    return [(before.rpartition("\n")[2].strip(), mark == RIGHT) for before, mark in MARKED.findall(thinking)]


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key that orders numbers by value: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
