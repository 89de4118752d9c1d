"""What can be evaluated: any reasoning-gym dataset, a JSONL file of question/answer pairs, the environments of a recipe
for reinforcement learning, and HumanEval.

On the command line a task is `name` or `name:option=value,…`: `gsm-symbolic`,
`countdown:min_numbers=3,max_numbers=3`, `mine.jsonl`, `rl-recipe.toml`, `humaneval`.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rorqual.errors import UserError
from rorqual.reason.environment import Environment, Problem, extract_answer, open_environment
from rorqual.reason.prompts import Template, prompt_text
from rorqual.recipe import EnvironmentSection, load_recipe

NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?"


class Task(Protocol):
    """Problems of a held-out split, how to ask them, and how to judge what comes back."""

    name: str

    def problems(self, n: int, seed: int) -> list[Problem]: ...

    def prompt(self, problem: Problem, tokenizer: Any, template: Template) -> str:
        """The text the model continues."""

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """What a finished completion votes for; None where it gives no answer."""

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        """Whether each completion solves its problem."""


class EnvironmentTask:
    """Problems of an environment's `split`; "test" shares no number multiset or text with any training problem."""

    def __init__(self, environment: Environment, name: str | None = None, split: str = "test") -> None:
        self.environment, self.name, self.split = environment, name or environment.family, split

    def problems(self, n: int, seed: int) -> list[Problem]:
        return self.environment.problems(split=self.split, n=n, seed=seed)

    def prompt(self, problem: Problem, tokenizer: Any, template: Template) -> str:
        return prompt_text(problem.question, template, tokenizer)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        return read_answer(problem, prompt, text)

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [self.environment.correct(p, a) for p, a in zip(problems, answers, strict=True)]


def open_task(task: "str | Task | EnvironmentSection | Environment", split: str = "test") -> Task:
    """A task by command-line name, by a recipe's section, or as it is. Raises UserError for an unknown name."""
    if isinstance(task, Environment):
        return EnvironmentTask(task, split=split)
    if isinstance(task, EnvironmentSection):
        return EnvironmentTask(open_environment(task), split=split)
    if not isinstance(task, str):
        return task
    name, colon, options = task.partition(":")
    if name == "humaneval":
        if colon:
            raise UserError(f"task {task!r}: humaneval takes no options; write humaneval")
        from rorqual.evals.humaneval import HumanEval

        return HumanEval()
    config = _options(task, options) if colon else {}
    if name.endswith(".jsonl"):
        section = EnvironmentSection(name=Path(name).stem, path=name, config=config)
    else:
        section = EnvironmentSection(name=name.replace("-", "_"), config=config)
    return EnvironmentTask(open_environment(section), name=task, split=split)


def split_tasks(text: str) -> list[str | EnvironmentSection]:
    """`--tasks` into its tasks: a comma ends a task unless the next word is one more option of it.

    A recipe stands for its environments. Raises UserError for an empty word or a recipe that cannot be read.
    """
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
        every += load_recipe(task, "rl").environments if task.endswith(".toml") else [task]
    return every


def _options(task: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"v = {{{text}}}")["v"]
    except tomllib.TOMLDecodeError:
        raise UserError(f"task {task!r}: options are written name:option=value,option=value, as in TOML") from None


def read_answer(problem: Problem, prompt: str, text: str) -> str | None:
    """The answer of one finished completion.

    A completion that uses the R1 format is held to it. One without any of its tags, to a prompt that did not open
    <think> itself, is read as benchmarks read chat models, so that a gain is not a gain of format alone: \\boxed{…},
    else "answer is …", else, for a number, the last number.
    """
    if prompt.rstrip().endswith("<think>") or re.search(r"</?(?:think|answer)>", text):
        shut = prompt.rstrip().endswith("</think>")  # the prompt has left the thinking out
        return extract_answer("</think>" * shut + text)
    if boxed := re.findall(r"\\boxed\{([^{}]+)\}", text):
        return boxed[-1].strip()
    numeric = re.fullmatch(NUMBER, problem.answer.strip()) is not None
    if said := re.findall(r"answer(?: is|:)[ *:$]*([^\n]+)", text, re.IGNORECASE):
        phrase = said[-1].strip(" .*$")
        number = re.search(NUMBER, phrase)
        if not numeric or number:
            return number[0].replace(",", "") if numeric else phrase
    if numeric and (numbers := re.findall(NUMBER, text)):
        return numbers[-1].replace(",", "")
    return None
