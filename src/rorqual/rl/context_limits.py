"""Prompts that leave no room for their answers in the model's context, found before anything starts."""

import sys
from collections.abc import Sequence
from typing import Any

from rorqual.errors import UserError
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.prompts import Template, prompt_text, render

ENOUGH = 200  # problems that do not fit, after which none is expected to


def check_context(
    environments: Sequence[Environment],
    template: Template,
    tokenizer: Any,
    context: int,
    answer: int,
    setting: str,
) -> None:
    """Hold the environments to problems whose prompt, with `answer` tokens after it, is within the context.

    Of generated problems others are passed over. Raises UserError for one in a file, with its line: what the user
    wrote is asked as a whole. `setting`: what gave `answer`.
    """
    room = context - answer
    holds = f"the model's context holds {context} (max_position_embeddings)"
    if room < 1:
        raise UserError(f"{setting} = {answer} leaves no room for a question: {holds}; lower it")
    for environment in environments:
        fits = _ContextFilter(environment.family, template, tokenizer, room, f"{setting} = {answer}: {holds}")
        problems = environment.everything()
        if problems is None:
            environment.fits = fits
        elif long := [problem for problem in problems if fits.tokens(problem) > room]:
            others = f", and {len(long) - 1} others are too long as well" if len(long) > 1 else ""
            raise UserError(
                f"{long[0].where}: the prompt has {fits.tokens(long[0])} tokens and leaves no room for {setting} = "
                f"{answer}: {holds}{others}; shorten or remove it, or lower {setting}"
            )


class _ContextFilter:
    """Whether a generated problem fits; says so at the first that does not, and ends where none does."""

    def __init__(self, family: str, template: Template, tokenizer: Any, room: int, what: str) -> None:
        self.family, self.template, self.tokenizer, self.room, self.what = family, template, tokenizer, room, what
        self.fitting = self.passed_over = 0

    def tokens(self, problem: Problem) -> int:
        """Of the prompt; 0 where it has no more bytes than there is room for tokens, so that it fits in any case."""
        if len(prompt_text(problem.question, self.template, self.tokenizer).encode()) <= self.room:
            return 0
        return len(render(problem.question, self.template, self.tokenizer))

    def __call__(self, problem: Problem) -> bool:
        if self.tokens(problem) <= self.room:
            self.fitting += 1
            return True
        self.passed_over += 1
        if not self.fitting and self.passed_over == ENOUGH:
            raise UserError(
                f"environment {self.family}: none of {ENOUGH} problems leaves room for {self.what}; narrow its config"
            )
        if self.passed_over == 1:
            print(
                f"environment {self.family}: problems that leave no room for {self.what} are passed over",
                file=sys.stderr,
            )
        return False
