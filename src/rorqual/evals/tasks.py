"""Evaluation tasks: published benchmarks, reasoning-gym datasets, files of questions and answers, and the environments
of an RL recipe.

A file is used as a whole, like a benchmark. Datasets and a recipe's environments, files included, use their held-out
split.

On the command line a task is `name` or `name:option=value,…`: `gsm-symbolic`,
`countdown:min_numbers=3,max_numbers=3`, `mine.jsonl`, `mine.py:Sums`, `rl-recipe.toml`, `math500`.
"""

import os
import random
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol

from rorqual.data.corpus import named
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.benchmarks.registry import BENCHMARKS, open_benchmark
from rorqual.evals.collected import Sample
from rorqual.evals.second_reading import by_math_verify
from rorqual.recipe import EnvironmentSection, RLRecipe, load_recipe
from rorqual.rl.envs.environment import RewardError, Split
from rorqual.rl.envs.environment import Sample as Episode
from rorqual.rl.envs.jsonl import SUFFIXES
from rorqual.rl.envs.registry import Environment, JsonlEnvironment, Problem, PythonEnvironment, open_environment
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.prompts import Template, problem_text
from rorqual.tokenizer_protocol import Tokenizer

# (problems, completions with the tag that the prompt opened, answers) → whether each solves its problem
Verdicts = Callable[[Sequence[Problem], Sequence[str], Sequence[str | None]], list[bool]]


class Task(Protocol):
    """Held-out problems, their prompts, and how completions are scored."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str:
        """ "test", "dev", or "all" of a benchmark."""
        ...

    @property
    def judge(self) -> str:
        """What decides whether an answer is right, in a few words."""
        ...

    def problems(self, n: int, seed: int) -> list[Problem]:
        """At most `n` problems, chosen by `seed`."""
        ...

    def prompt(self, problem: Problem, tokenizer: Tokenizer, template: Template) -> str:
        """The prompt as text."""
        ...

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """The answer that a finished completion votes for; None where it has none. `text`: the completion with the tag
        that the prompt opened (`Engine.opening`)."""
        ...

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        """Whether each completion solves its problem."""
        ...


class EnvironmentTask:
    """Problems of an environment's `split`; "test" shares no number multiset or text with training problems."""

    def __init__(
        self, environment: Environment, name: str | None = None, split: Split | Literal["all"] = "test"
    ) -> None:
        self.environment, self.name = environment, name or environment.family
        self.split: Split | Literal["all"] = split

    @property
    def judge(self) -> str:
        return "final answer, by value" if isinstance(self.environment, JsonlEnvironment) else "its environment"

    def problems(self, n: int, seed: int) -> list[Problem]:
        assert self.split != "all"  # of a `FileTask`
        return self.environment.problems(split=self.split, n=n, seed=seed)

    def prompt(self, problem: Problem, tokenizer: Tokenizer, template: Template) -> str:
        return problem_text(problem, template, tokenizer)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        return self.environment.read(problem, text)

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [self.environment.correct(p, a) for p, a in zip(problems, answers, strict=True)]

    @property
    def grades_episodes(self) -> bool:
        """Whether the environment judges what was said in all turns, so that `play` stands for sampling and `score`."""
        return isinstance(self.environment, PythonEnvironment)

    def play(
        self, engine: Engine, problems: Sequence[Problem], params: SamplingParams, template: Template
    ) -> list[Sample]:
        """Played episodes, with the sampled tokens of all turns and the text of the last.

        One whose reward fails counts as wrong, with a line on standard error.
        """
        environment = self.environment
        rollout = sample_rollout(engine, problems, template, params, {environment.family: environment})
        return [
            Sample(
                text=rollout.texts[i],
                opening="",
                tokens=played.length,
                finish_reason="length" if played.truncated else "stop",
                answer=None if played.truncated else environment.read(played.problem, played.text),
                correct=self._right(played),
                parts={},
                turns=sum(m["role"] == "assistant" for m in played.turns) if played.turns else None,
                messages=[dict(m) for m in played.turns] if played.turns else None,
            )
            for i, played in enumerate(rollout.samples)
        ]

    def _right(self, played: Episode) -> bool:
        try:
            return not played.error and self.environment.grade(played)[1]
        except RewardError as e:
            print(f"{e}; the episode counts as wrong", file=sys.stderr)
            return False


class FileTask(EnvironmentTask):
    """All problems of a file of questions and answers, duplicates included."""

    second_judge = "math-verify"

    def __init__(self, path: str) -> None:
        self.file = JsonlEnvironment(EnvironmentSection(name=Path(path).stem, path=path))
        super().__init__(self.file, name=path, split="all")

    def problems(self, n: int, seed: int) -> list[Problem]:
        """All in the file's order, or a random `n` of them chosen by `seed`."""
        everything = self.file.all_problems()
        return everything if n >= len(everything) else random.Random(seed).sample(everything, n)

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        return by_math_verify(problems, texts)


TaskLike = str | Task | EnvironmentSection | Environment


def open_task(task: TaskLike, split: Split = "test", data: str | None = None) -> Task:
    """A task from a command-line name or a recipe section; a `Task` unchanged. Raises UserError for an unknown name.

    data: a benchmark's local file or folder, or its name on the Hub.
    """
    if isinstance(task, Environment):
        return EnvironmentTask(task, split=split)
    if isinstance(task, EnvironmentSection):
        return EnvironmentTask(open_environment(task), split=split)
    if not isinstance(task, str):
        return task
    name, colon, options = task.partition(":")
    if colon and named(Path(name), ".py"):
        section = EnvironmentSection(name=options, python=task)
        return EnvironmentTask(open_environment(section), name=task, split=split)
    if colon and named(Path(name), *SUFFIXES):
        raise UserError(f"task {task!r}: a file has no options; write {name}")
    if named(Path(task), *SUFFIXES) or "/" in name or os.path.isfile(task):
        return FileTask(task)
    config = _options(task, options) if colon else {}
    if name.lower() in BENCHMARKS:
        return open_benchmark(name.lower(), config, data)
    section = EnvironmentSection(name=name.replace("-", "_"), config=config)
    try:
        environment = open_environment(section)
    except UserError as e:
        if close := get_close_matches(name.lower(), BENCHMARKS, 1):
            raise UserError(f"{e}; or do you mean the benchmark {close[0]}?") from None
        raise
    return EnvironmentTask(environment, name=task, split=split)


def split_tasks(text: str) -> list[str | EnvironmentSection]:
    """Split `--tasks` at commas, except before another option of the same task.

    A recipe is replaced by its environments. Raises UserError for an empty word or a recipe that cannot be read.
    """
    if os.path.isfile(text) and named(Path(text), *SUFFIXES):  # its name may contain commas
        return [text]
    words = [word.strip() for word in re.split(r",(?![^\[]*\])", text)]
    tasks: list[str] = []
    for word in words:
        if not word:
            raise UserError(f"--tasks {text!r} has an empty task; write names with commas between them")
        if tasks and ":" in tasks[-1] and "=" in word and ":" not in word:
            tasks[-1] += "," + word
        else:
            tasks.append(word)
    every: list[str | EnvironmentSection] = []
    for task in tasks:
        every += _with_rules(task) if task.lower().endswith(".toml") else [task]
    return every


def _with_rules(recipe: str) -> list[EnvironmentSection]:
    """The environments of a recipe without open ones, which are named. Raises UserError where there are no others."""
    environments = load_recipe(recipe, RLRecipe).environments
    ruled = [section for section in environments if not section.open]
    names = ", ".join(section.name for section in environments if section.open)
    if not ruled:
        raise UserError(f"{recipe}: nothing says which answers to {names} are right (open = true); give another task")
    if names:
        print(f"{recipe}: without {names}, where nothing says which answers are right (open = true)", file=sys.stderr)
    return ruled


def read_data(tasks: Sequence[str | EnvironmentSection], given: Sequence[str]) -> dict[str, str]:
    """{task: data} of `--data TASK=PATH`, or `--data PATH` where there is one task. Raises UserError for another task.

    Only benchmarks have data of their own.
    """
    names = [task.partition(":")[0].lower() for task in tasks if isinstance(task, str)]
    known = [name for name in names if name in BENCHMARKS]
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or (name.lower() not in BENCHMARKS and os.path.exists(text)):
            if len(tasks) != 1 or not known:
                raise UserError(f"--data {text!r} names no benchmark of --tasks; write TASK=PATH with TASK among them")
            name, path = known[0], text
        name = name.lower()
        if name not in known or not path:
            raise UserError(
                f"--data {text!r}: {name} is no benchmark of --tasks, or has no path; write TASK=PATH with "
                f"{' or '.join(known) or ', '.join(BENCHMARKS)}"
            )
        if name in found:
            raise UserError(f"--data gives data of {name} twice; remove one")
        found[name] = path
    return found


def _options(task: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"v = {{{text}}}")["v"]
    except tomllib.TOMLDecodeError:
        raise UserError(f"task {task!r}: options are written name:option=value,option=value, as in TOML") from None
