"""Checks before a run starts that prompt + `max_tokens` fit the model's context."""

import sys
from collections.abc import Sequence

from rorqual.errors import UserError
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.prompts import Template, problem_text, render_problem
from rorqual.rl.turns import Turns
from rorqual.tokenizer_protocol import Tokenizer

MAX_SKIPPED = 200  # problems that do not fit, with none that did, before the environment is refused


def check_context(
    environments: Sequence[Environment],
    template: Template,
    tokenizer: Tokenizer,
    context: int,
    max_tokens: int,
    setting: str,
) -> None:
    """Limit the environments to problems whose prompt and `max_tokens` completion tokens fit `context` tokens.

    Generated problems that do not fit are skipped later on. Raises UserError, with the line, for a problem of a file
    that does not fit, since a user's own problems are used in full, and for an environment of several turns whose turns
    the chat template does not append. `setting`: name of the recipe field that set
    `max_tokens`.
    """
    max_prompt = context - max_tokens
    holds = f"the model's context holds {context} (max_position_embeddings)"
    if max_prompt < 1:
        raise UserError(f"{setting} = {max_tokens} leaves no space for a prompt: {holds}; lower it")
    for environment in environments:
        if environment.turns > 1:
            Turns(tokenizer, template).check(environment)
        fits = _ContextFilter(environment.family, template, tokenizer, max_prompt, f"{setting} = {max_tokens}: {holds}")
        problems = environment.all_problems()
        if problems is None:
            environment.fits = fits
        elif long := [problem for problem in problems if fits.tokens(problem) > max_prompt]:
            others = f" ({len(long) - 1} more problems are too long)" if len(long) > 1 else ""
            raise UserError(
                f"{long[0].where}: the prompt has {fits.tokens(long[0])} tokens and leaves no space for {setting} = "
                f"{max_tokens}: {holds}{others}; shorten or remove it, or lower {setting}"
            )


class _ContextFilter:
    """Whether a generated problem fits. Prints a note at the first that does not; raises UserError when none does."""

    def __init__(self, family: str, template: Template, tokenizer: Tokenizer, max_prompt: int, limit: str) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.template: Template = template
        self.max_prompt, self.limit = max_prompt, limit
        self.fitting = self.skipped = 0

    def tokens(self, problem: Problem) -> int:
        """Tokens of the prompt; 0 without tokenising where its bytes are no more than the limit, so that it fits."""
        if len(problem_text(problem, self.template, self.tokenizer).encode()) <= self.max_prompt:
            return 0
        return len(render_problem(problem, self.template, self.tokenizer))

    def __call__(self, problem: Problem) -> bool:
        if self.tokens(problem) <= self.max_prompt:
            self.fitting += 1
            return True
        self.skipped += 1
        if not self.fitting and self.skipped == MAX_SKIPPED:
            raise UserError(
                f"environment {self.family}: none of {MAX_SKIPPED} prompts leaves space for {self.limit}; "
                "narrow its config"
            )
        if self.skipped == 1:
            print(
                f"environment {self.family}: problems whose prompt leaves no space for {self.limit} are skipped",
                file=sys.stderr,
            )
        return False
