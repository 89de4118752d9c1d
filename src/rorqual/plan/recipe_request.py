"""What a recipe asks of the planner, on chips other than this machine's."""

from typing import Any

from rorqual.errors import UserError
from rorqual.plan.layout import Layout, of_section
from rorqual.plan.reward_here import as_sft
from rorqual.recipe import DistillRecipe, PretrainRecipe, Recipe, RewardRecipe, RLRecipe, SFTRecipe


def recipe_request(recipe: Recipe) -> dict[str, Any]:
    """Fields of the request of its kind, as far as the recipe says them."""
    precision = {"precision": "fp8" if recipe.precision is not None else _dtype(recipe)}
    if isinstance(recipe, PretrainRecipe | SFTRecipe):
        return _training(recipe) | precision
    if isinstance(recipe, RewardRecipe):
        return _training(as_sft(recipe, 2 * recipe.data.sequence_length)) | precision
    if isinstance(recipe, RLRecipe):
        grpo = recipe.grpo
        mean = grpo.max_tokens / 2
        if grpo.rollout_weights in ("int8", "int4"):
            raise UserError(
                f"grpo.rollout_weights = {grpo.rollout_weights!r}: packed weights are for a CPU, and this plan is for "
                'GPUs; take "fp8", or leave it out'
            )
        asked: dict[str, Any] = {
            "questions": grpo.questions_per_step, "samples": grpo.group_size, "lengths": f"{mean}:{mean}",
            "limit": grpo.max_tokens, "stale": bool(recipe.rollouts.staleness),
            "weights": grpo.rollout_weights or "bfloat16",
        }  # fmt: skip
        return asked | precision | ({} if recipe.steps is None else {"steps": recipe.steps})
    assert isinstance(recipe, DistillRecipe)
    return precision | {
        "teacher": recipe.teacher, "problems": recipe.problems, "samples": recipe.samples, "limit": recipe.max_tokens,
        "answer": recipe.max_tokens / 2, "keep": recipe.keep_per_problem, "epochs": recipe.train.epochs or 1.0,
    }  # fmt: skip


def recipe_layout(recipe: PretrainRecipe | SFTRecipe, per_node: int) -> Layout | None:
    """That of its processes; None for one process, whose layout is searched."""
    section = recipe.parallel
    if section.processes == 1:
        return None
    precision = "fp8" if recipe.precision is not None else _dtype(recipe)
    return of_section(section, recipe.train.micro_batch or 1, per_node, precision, recipe.recompute)


def _training(recipe: PretrainRecipe | SFTRecipe) -> dict[str, Any]:
    section, length = recipe.train, recipe.data.sequence_length
    asked: dict[str, Any] = {"context": length, "batch": section.batch_size, "moments": recipe.optimizer.moments}
    if recipe.parallel.processes > 1:
        asked["gpus"] = recipe.parallel.processes
    if section.steps is not None:
        first, until = section.batch_ramp or (section.batch_size, 0.0)
        average = section.batch_size + (first - section.batch_size) * min(until, 1.0) / 2
        asked["tokens"] = section.steps * average * length
    return asked


def _dtype(recipe: Recipe) -> str:
    return "float32" if recipe.model.dtype == "float32" else "bfloat16"


def check_length_known(recipe: Recipe, asked: dict[str, Any]) -> None:
    """Raises UserError where a run ends by time or epochs, which say nothing of other chips."""
    if isinstance(recipe, PretrainRecipe | SFTRecipe | RewardRecipe) and not asked.keys() & {
        "tokens",
        "budget",
        "days",
    }:
        raise UserError(f"{recipe.name} ends by time or epochs, not by steps; say its --tokens")
    if isinstance(recipe, RLRecipe) and "steps" not in asked:
        raise UserError(f"{recipe.name} ends by time, not by steps; say its --steps")
