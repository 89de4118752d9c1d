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
from rich.table import Table

from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.stats import cons_at_k, interval, paired_difference, pass_at_1, pass_at_k
from rorqual.evals.tasks import Task, open_task
from rorqual.rl.envs.registry import Problem
from rorqual.rl.prompts import Template
from rorqual.rl.rewards import RIGHT, WRONG, self_verified
from rorqual.tokenizer_protocol import Tokenizer

TEMPERATURE, TOP_P = 0.6, 0.95  # R1's sampling for evaluation (R1, "Evaluation")
MARKED = re.compile(f"([^{RIGHT}{WRONG}]*)([{RIGHT}{WRONG}])")

# Whether a line that the model marked ✓ is correct; None where the line is not a candidate.
LineChecker = Callable[[Problem, str], bool | None]


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Any],
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
    split: str = "test",
    check_line: LineChecker | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """pass@1, cons@k and pass@k of each task, with 95% bootstrap intervals over problems.

    tasks: names as on the command line, recipe sections, environments or `Task`s. k (default: `samples`): cons@k is the
    majority vote of the first k samples, pass@k is over all draws of k. A truncated completion has no answer. The
    result is JSON-able; `tasks[name]` has split ("all": a whole file or benchmark), pass_at_1, interval, cons_at_k,
    cons_interval, pass_at_k, pass_k_interval, mean_tokens, truncated_share, answered_share, verified_share (the last
    mark before `</think>` is ✓), verdict_precision (correct among lines marked ✓: all that `check_line` can judge, else
    the last one by the final answer), by_difficulty, and scores [P] with questions_hash for `compare`. Raises
    UserError, before anything is sampled, for an unknown task, too few problems, a question longer than the context,
    invalid sampling parameters, or model code that cannot be isolated.
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
    started, results = time.monotonic(), {}
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
            found = collect(engine, tokenizer, task, chosen, params, template, advance)
            results[task.name] = summarise(found, k, seed, check_line) | {"split": task.split}
    return {
        "tasks": results,
        "samples": samples,
        "k": k or samples,
        "seed": seed,
        "split": split,
        "template": template,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "thinking_budget": thinking_budget,
        "seconds": time.monotonic() - started,
    }


def sampling_params(samples: int, problems: int, template: Template = "chat", **settings: Any) -> SamplingParams:
    """The sampling parameters among the arguments of `evaluate`. Raises UserError for invalid ones."""
    if samples < 1 or problems < 1:
        raise UserError(f"samples = {samples}, problems = {problems}: both must be at least 1")
    if template not in get_args(Template):
        raise UserError(f"template = {template!r}: must be one of {', '.join(get_args(Template))}")
    return SamplingParams(n=samples, **settings)


def thinking_curve(
    engine: Engine, tokenizer: Tokenizer, task: Any, budgets: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """Accuracy by thinking budget: `</think>` is forced after that many thinking tokens.

    options: of `evaluate`. Entries have budget (tokens), pass_at_1, interval, mean_tokens, in order of budget. All
    budgets use the same problems.
    """
    opened = open_task(task, options.get("split", "test"))
    curve = []
    for budget in sorted(budgets):
        result = evaluate(engine, tokenizer, [opened], thinking_budget=budget, **options)["tasks"][opened.name]
        curve.append({"budget": budget} | {name: result[name] for name in ("pass_at_1", "interval", "mean_tokens")})
    return curve


def compare(before: dict[str, Any], after: dict[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Gain of pass@1 between two results of `evaluate`, paired by problem: {task: {gain, interval}}.

    Raises UserError where the two are of different problems.
    """
    gains = {}
    for name in (name for name in after["tasks"] if name in before["tasks"]):
        old, new = before["tasks"][name], after["tasks"][name]
        if old["questions_hash"] != new["questions_hash"]:
            raise UserError(f"task {name}: the two results are of different problems; evaluate with the same seed")
        gain, *bounds = paired_difference(np.array(old["scores"]), np.array(new["scores"]), seed)
        gains[name] = {"gain": gain, "interval": bounds}
    return gains


def table(result: dict[str, Any]) -> Table:
    """The result as a terminal table: a row per task, and per difficulty where there are several."""
    k = result["k"]
    caption = f"{result['samples']} samples per problem at temperature {result['temperature']}; 95 % intervals"
    out = Table(title=result.get("model"), caption=caption)
    for name in (
        "task",
        "problems",
        "pass@1",
        f"cons@{k}",
        f"pass@{k}",
        "tokens",
        "truncated",
        "self-verified",
        "verifier precision",
    ):
        out.add_column(name, justify="left" if name == "task" else "right")
    for name, row in result["tasks"].items():
        out.add_row(name, *_cells(row))
        if len(row["by_difficulty"]) > 1:
            for level, part in row["by_difficulty"].items():
                out.add_row(f"  {level}", *_cells(part), style="dim")
    return out


def gains_table(gains: dict[str, dict[str, Any]]) -> Table:
    """The result of `compare` as a terminal table."""
    out = Table(caption="points of pass@1, paired by problem; 95 % intervals")
    out.add_column("task")
    out.add_column("gain", justify="right")
    for name, found in gains.items():
        low, high = (100 * bound for bound in found["interval"])
        out.add_row(name, f"{100 * found['gain']:+.1f} [{low:+.1f}, {high:+.1f}]")
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    def share(name: str, bounds: str = "") -> str:
        if row.get(name) is None:
            return "–"
        text = f"{100 * row[name]:.1f}"
        return f"{text} [{100 * row[bounds][0]:.1f}, {100 * row[bounds][1]:.1f}]" if bounds else f"{text} %"

    return [
        str(row["problems"]),
        share("pass_at_1", "interval"),
        share("cons_at_k", "cons_interval"),
        share("pass_at_k", "pass_k_interval"),
        f"{row['mean_tokens']:.0f}",
        share("truncated_share"),
        share("verified_share"),
        share("verdict_precision"),
    ]


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
    tokenizer: Tokenizer,
    task: Task,
    problems: list[Problem],
    params: SamplingParams,
    template: Template,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """Sample `params.n` completions per problem and score them; `progress` receives counts of completions."""
    prompts = [task.prompt(problem, tokenizer, template) for problem in problems]
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
    collected: Collected, k: int | None = None, seed: int = 0, check_line: LineChecker | None = None
) -> dict[str, Any]:
    """The results of one task, as in `evaluate`; arguments as there."""
    problems = collected.problems
    scores = _TaskScores(collected, k, seed, check_line)
    levels = sorted({problem.difficulty for problem in problems} - {""}, key=_natural)
    indices = np.arange(len(problems))
    by_difficulty = {
        level: scores.summary(indices[[problem.difficulty == level for problem in problems]]) for level in levels
    }
    return scores.summary(indices) | {
        "by_difficulty": by_difficulty,
        # Of the questions without their prompt templates.
        "questions_hash": hashlib.sha256("\0".join(p.question for p in problems).encode()).hexdigest(),
        "scores": pass_at_1(scores.correct).tolist(),
    }


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

    def summary(self, chosen: np.ndarray) -> dict[str, Any]:
        """All results of the problems with indices `chosen`."""
        correct, answers = self.correct[chosen], self.answers[chosen]
        marked = int(self.marked[chosen].sum())
        first, any_of = pass_at_1(correct), pass_at_k(correct, self.k)
        votes = any(answer is not None for answer in self.answers.flat)
        agreed = cons_at_k(answers[:, : self.k], correct[:, : self.k]) if votes else None
        return {
            "problems": len(chosen),
            "k": self.k,
            "pass_at_1": float(first.mean()),
            "interval": list(interval(first, self.seed)),
            "cons_at_k": None if agreed is None else float(agreed.mean()),
            "cons_interval": None if agreed is None else list(interval(agreed, self.seed)),
            "pass_at_k": float(any_of.mean()),
            "pass_k_interval": list(interval(any_of, self.seed)),
            "mean_tokens": float(self.tokens[chosen].mean()),
            "truncated_share": float(self.truncated[chosen].mean()),
            "answered_share": float(np.mean(answers != None)) if votes else None,  # noqa: E711 (elementwise)
            "verified_share": float(self.verified[chosen].mean()),
            "verdict_precision": int(self.marked_correct[chosen].sum()) / marked if marked else None,
        }


def read_verdicts(text: str) -> list[tuple[str, bool]]:
    """The candidates that the model marked before `</think>`: (text of the line before the mark, whether ✓)."""
    thinking = text.partition("</think>")[0]
    return [(before.rpartition("\n")[2].strip(), mark == RIGHT) for before, mark in MARKED.findall(thinking)]


def _natural(text: str) -> list[Any]:
    """Sort key that orders numbers by value: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
