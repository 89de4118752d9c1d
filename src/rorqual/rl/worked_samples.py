"""Worked solutions (rl/worked) as samples of a distillation: written, judged and filtered as a model's are."""

from collections.abc import Iterator, Sequence
from random import Random
from statistics import fmean
from typing import Any

from rorqual.data.chat_dataset import encode_sample
from rorqual.data.chat_template import ChatTemplate
from rorqual.errors import UserError
from rorqual.recipe import DistillRecipe
from rorqual.rl.envs.registry import Environment, Problem, PythonEnvironment, open_environment
from rorqual.rl.prompts import problem_text
from rorqual.rl.rejection_sampling import BATCH, KEPT, Batch, draw_problems
from rorqual.rl.rollout import derived_seed
from rorqual.rl.sample_filter import refused
from rorqual.rl.worked import WRITERS, write
from rorqual.tokenizer_protocol import Tokenizer


def check_worked(environments: Sequence[Environment]) -> None:
    """Raises UserError for an environment without worked solutions."""
    unknown = [e.family for e in environments if e.family not in WRITERS and not e.has_worked]
    if unknown:
        raise UserError(
            f"environment {unknown[0]}: there are no worked solutions of it, only of {', '.join(sorted(WRITERS))}, and "
            "of Python environments with a method `worked`; leave it out, or take a model as the teacher"
        )


def worked_tokens(recipe: DistillRecipe, tokenizer: Tokenizer) -> float:
    """Mean tokens of a sample of written solutions, of a few problems, as the student reads them: with the prompt, the
    tools' descriptions and what they return. Raises UserError.
    """
    template = ChatTemplate(tokenizer)
    return fmean(len(encode_sample(row, tokenizer, template=template)[0]) for row in few_worked(recipe, tokenizer))


def few_worked(recipe: DistillRecipe, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Samples of written solutions of a few problems. Raises UserError where there are none."""
    environments = [open_environment(section) for section in recipe.environments]
    check_worked(environments)
    few = recipe.model_copy(update={"problems": 8 * len(environments)})
    rows = [row for batch in worked_batches(few, environments, 0, tokenizer) for row in batch.rows]
    if not rows:
        raise UserError(
            f"none of the worked solutions of {few.problems} problems is right and as the filter wants it; correct them"
        )
    return rows


def worked_batches(
    recipe: DistillRecipe, environments: Sequence[Environment], start: int, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """`keep_per_problem` written solutions of each problem, as the judge of rewards and the filter accept them."""
    by_family = {environment.family: environment for environment in environments}
    template = ChatTemplate(tokenizer)
    drawn = draw_problems(environments, recipe.problems, recipe.seed)
    for first in range(start, len(drawn), BATCH):
        batch = Batch(min(first + BATCH, len(drawn)))
        for i, problem in enumerate(drawn[first : first + BATCH], first):
            prompt = problem_text(problem, recipe.template, tokenizer)
            for k in range(recipe.keep_per_problem):
                rng = Random(derived_seed(recipe.seed, "worked", i, k))
                row, right = _worked_row(by_family[problem.family], problem, prompt, rng, template)
                if row is None:
                    batch.count(problem.family, "of a form not known")
                elif not right:
                    batch.count(problem.family, "wrong")
                elif why := refused(row["text"], row["length"], recipe.filter, recipe.reward.target_language):
                    batch.count(problem.family, why)
                else:
                    batch.count(problem.family, KEPT)
                    batch.rows.append({name: value for name, value in row.items() if name != "text"})
        yield batch


def _worked_row(
    environment: Environment, problem: Problem, prompt: str, rng: Random, template: ChatTemplate
) -> tuple[dict[str, Any] | None, bool]:
    """(a sample, with all that the model says in it as `text`; whether it is correct).

    Its `length` is that of a sampled one: the tokens of all turns of the model, with calls and end tokens.
    """
    own: dict[str, Any] | None = None
    if isinstance(environment, PythonEnvironment):
        sample = environment.worked(problem, rng)
        if sample is None:
            return None, False
        text = "\n".join(m["content"] or "" for m in sample.turns if m["role"] == "assistant")
        if environment.turns > 1:
            own = {"messages": sample.messages, "tools": problem.tools}
        right = environment.grade(sample)[1]
    else:
        worked = write(problem, rng)
        if worked is None:
            return None, False
        text = worked.completion
        right = environment.correct(problem, environment.read(problem, text))
    if own is None:
        own = {"prompt": prompt, "completion": text.removeprefix("<think>") if prompt.endswith("<think>") else text}
    length = sum(encode_sample(own, template.tokenizer, "a worked solution", template)[1])
    return own | {"family": problem.family, "length": length, "text": text}, right
