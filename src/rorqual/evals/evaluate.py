"""`rorqual eval`: sample answers to held-out problems; pass@1, cons@k and pass@k with bootstrap intervals.

Shapes: P problems, S samples per problem.
"""

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.audit import audit
from rorqual.evals.benchmarks.benchmark import Benchmark
from rorqual.evals.collected import Collected, Sample
from rorqual.evals.out_folder import OutFolder
from rorqual.evals.peer_formats import write_results
from rorqual.evals.results import CurvePoint, Evaluation
from rorqual.evals.summary import LineChecker, summarise
from rorqual.evals.tasks import EnvironmentTask, Task, TaskLike, open_task
from rorqual.rl.envs.environment import Problem, Split
from rorqual.rl.prompts import Template
from rorqual.train.interrupts import stopping_at_once

TEMPERATURE, TOP_P = 0.6, 0.95  # R1's sampling for evaluation (R1, "Evaluation")


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
    audited: bool = False,
    out: Path | None = None,
    model: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Evaluation:
    """pass@1, cons@k and pass@k of each task, with 95% bootstrap intervals over problems.

    tasks: names as on the command line, recipe sections, environments or `Task`s. k (default: `samples`): cons@k is the
    majority vote of the first k samples, pass@k is over all draws of k. A truncated completion has no answer.
    `verdict_precision` counts the lines marked ✓ that `check_line` can judge, without it the last one by the final
    answer. audited: judge the answers a second time (`audit`). out: a folder (`OutFolder`) that keeps every finished
    batch of answers, goes on where it was left, and gets the results in three formats (`write_results`). model: what
    identifies it there, its name as `model`. Raises UserError, before anything is sampled, for an unknown task, too few
    problems, a question longer than the context (a benchmark's counts as unfinished), invalid sampling parameters,
    model code that cannot be isolated, or a folder of other settings.
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
    started = time.monotonic()
    drawn = [task.problems(problems, seed) for task in opened]
    fitting = [_fitting(engine, t, chosen, params, template) for t, chosen in zip(opened, drawn, strict=True)]
    result = Evaluation(
        tasks={}, samples=samples, k=k or samples, seed=seed, split=split, template=template, temperature=temperature,
        top_p=top_p, max_tokens=max_tokens, thinking_budget=thinking_budget, seconds=0.0,
    )  # fmt: skip
    settings = _settings(result, names, [list(prompts.values()) for prompts in fitting], model or {})
    folder = None if out is None else OutFolder(out, settings)
    keeping = (
        nullcontext()
        if folder is None
        else stopping_at_once(f"amid an evaluation; {out} keeps the finished answers for the next start")
    )
    with keeping, nullcontext() if folder is None else folder.held(), _progress(quiet) as bar:
        every = dict[str, Collected]()
        note = _notes(quiet)
        note(f"{samples * sum(map(len, fitting))} answers to {', '.join(names)}")
        for task, chosen, prompts in zip(opened, drawn, fitting, strict=True):
            began = time.monotonic()
            asked = [chosen[i] for i in prompts]
            line = bar.add_task(task.name, total=len(asked) * samples)
            advance = functools.partial(bar.advance, line)
            sample = functools.partial(_part, engine, task, asked, params, template, advance)
            if folder is None:
                found = sample(0, len(asked))
            else:
                found = folder.collect(task.name, asked, list(prompts.values()), samples, sample, advance)
            every[task.name] = found = _with_unasked(found, chosen, list(prompts))
            attempts = task.attempts if isinstance(task, Benchmark) else 1
            figures = summarise(found, k, seed, check_line, task.split, task.judge, attempts)
            result.tasks[task.name] = replace(figures, unasked=len(chosen) - len(asked))
            if audited and (second := audit(task, found, seed)) is not None:
                result.audits[task.name] = second
            note(f"{task.name}: pass@1 {figures.pass_at_1:.3f}, {time.monotonic() - began:.0f} s")
        result = replace(result, seconds=time.monotonic() - started)
        if folder is not None and out is not None:
            write_results(out, result, every, (model or {}).get("model", "model"), folder.began)
    return result


def _fitting(
    engine: Engine, task: Task, problems: list[Problem], params: SamplingParams, template: Template
) -> dict[int, str]:
    """{index of a problem: its prompt}, of those that the context holds. Raises UserError where one does not, but for
    benchmarks: of those only where none does."""
    tokenizer = engine.require_tokenizer()
    prompts: dict[int, str] = {}
    refused: UserError | None = None
    for i, problem in enumerate(problems):
        try:
            prompt = task.prompt(problem, tokenizer, template)
            engine.check([tokens_of(engine, prompt, template)], params)
        except UserError as e:
            refused = refused or UserError(f"{problem.where or f'task {task.name}'}: {e}")
            if not isinstance(task, Benchmark):
                raise refused from None
        else:
            prompts[i] = prompt
    if refused is not None and not prompts:
        raise refused
    return prompts


def _with_unasked(found: Collected, problems: list[Problem], asked: list[int]) -> Collected:
    """Answers to the problems `asked`, and unfinished ones to the others, in the order of the problems."""
    each, places = found.per_problem, {problem: i for i, problem in enumerate(asked)}
    whole = Collected(problems, [], [])
    for i in range(len(problems)):
        at = places.get(i)
        whole.prompts.append("" if at is None else found.prompts[at])
        nothing = [Sample("", "", 0, "length", None, False, {})] * each
        whole.samples += nothing if at is None else found.samples[at * each : (at + 1) * each]
    return whole


def _part(
    engine: Engine, task: Task, problems: list[Problem], params: SamplingParams, template: Template,
    progress: Callable[[int], None], start: int, end: int,
) -> Collected:  # fmt: skip
    """Answers to the problems [start, end). Each problem has a seed of its own, as in one call for all of them."""
    own = replace(params, seed=(params.seed or 0) + (start << 32))
    return collect(engine, task, problems[start:end], own, template, progress)


def _settings(
    result: Evaluation, names: Sequence[str], prompts: Sequence[Sequence[str]], model: Mapping[str, str]
) -> dict[str, Any]:
    """What the answers follow from, flat."""
    sampling = ("samples", "seed", "template", "temperature", "top_p", "max_tokens", "thinking_budget")
    settings = {**model, **{name: getattr(result, name) for name in sampling}, "tasks": ", ".join(names)}
    for name, some in zip(names, prompts, strict=True):
        settings[f"prompts of {name}"] = (
            f"{len(some)}, hash {hashlib.sha256(chr(0).join(some).encode()).hexdigest()[:16]}"
        )
    return settings


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
        samples = task.play(engine, problems, params, template)
        if progress:
            progress(len(samples))
        return Collected(problems, prompts, samples)
    encoded = [tokens_of(engine, prompt, template) for prompt in prompts]
    completions = engine.generate(encoded, params, progress=progress)
    repeated = [problem for problem in problems for _ in range(params.n)]
    openings = [engine.opening(prompt) for prompt in encoded for _ in range(params.n)]
    texts = [opening + c.text for opening, c in zip(openings, completions, strict=True)]
    answers = [
        task.answer(repeated[i], prompts[i // params.n], texts[i]) if c.finish_reason == "stop" else None
        for i, c in enumerate(completions)
    ]
    correct = task.score(repeated, texts, answers)
    parts = [task.parts(p, t) if isinstance(task, Benchmark) else {} for p, t in zip(repeated, texts, strict=True)]
    samples = [
        Sample(c.text, openings[i], len(c.tokens), c.finish_reason, answers[i], correct[i], parts[i])
        for i, c in enumerate(completions)
    ]
    return Collected(problems, prompts, samples)


def tokens_of(engine: Engine, prompt: str, template: Template) -> Sequence[int]:
    """Token ids of a task's prompt; BOS is added unless a chat template has rendered it."""
    return engine.encode(prompt, begin=template != "chat" or not getattr(engine.tokenizer, "chat_template", None))


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())


def _notes(quiet: bool) -> Callable[[str], None]:
    """Lines in the progress bar's place, where the output is no terminal."""
    hidden = quiet or sys.stderr.isatty()
    return lambda line: None if hidden else print(line, file=sys.stderr, flush=True)
