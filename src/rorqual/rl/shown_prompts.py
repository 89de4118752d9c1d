"""What `--dry-run` shows of what the model reads: the first prompts of a run, or a worked solution."""

from collections.abc import Sequence
from textwrap import indent

from rorqual.data.chat_dataset import encode_sample
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.special_tokens import unescape
from rorqual.recipe import DistillRecipe, RLRecipe
from rorqual.rl.envs.registry import Environment
from rorqual.rl.prompts import problem_text, render_problem
from rorqual.rl.rollout import derived_seed
from rorqual.rl.worked_samples import few_worked
from rorqual.tokenizer_protocol import Tokenizer


def first_prompts(recipe: RLRecipe, tokenizer: Tokenizer, environments: Sequence[Environment]) -> list[str]:
    """The prompt of each environment's first problem in the run, as text."""
    shown: list[str] = []
    for environment in environments:
        problem = next(environment.stream("train", derived_seed(recipe.seed, environment.family)))
        tokens = len(render_problem(problem, recipe.template, tokenizer))
        text = problem_text(problem, recipe.template, tokenizer)
        shown.append(_shown(f"{environment.family}, the first prompt of {tokens} tokens", text))
    return shown


def worked_sample(recipe: DistillRecipe, tokenizer: Tokenizer) -> str:
    """The first worked solution of a recipe whose teacher they are, as the student reads it. Raises UserError."""
    row = few_worked(recipe, tokenizer)[0]
    template = ChatTemplate(tokenizer)
    tokens, trained = encode_sample(row, tokenizer, template=template)
    if "prompt" in row:
        text = row["prompt"] + row["completion"]
    else:
        text = template.render(row["messages"], row["tools"], generation=False)
    head = f"{row['family']}, a worked solution of {len(tokens)} tokens, {sum(trained)} of them the model's"
    return _shown(head, text)


def _shown(head: str, text: str) -> str:
    return f"{head}:\n{indent(unescape(text).rstrip(), '    ', lambda line: True)}"
