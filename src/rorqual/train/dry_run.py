"""`--dry-run`: the plan of a recipe; nothing is trained or written."""

import torch

from rorqual.data.tokenizer import load_tokenizer
from rorqual.kernels.devices import find_device
from rorqual.model import ModelConfig
from rorqual.parallel.context import check_pieces
from rorqual.parallel.mesh import ranks_per_node
from rorqual.plan.estimate import Plan, plan_text, predict, run_text
from rorqual.recipe import PretrainRecipe, SFTRecipe
from rorqual.train.build_model import check_length, check_model, model_config, set_threads, tokenizer_at
from rorqual.train.layout_plan import layout_text, plan_layout


def dry_run_text(recipe: PretrainRecipe | SFTRecipe) -> str:
    """What `--dry-run` prints. Raises UserError as the run would."""
    device, plan = _device(recipe), dry_run(recipe)
    if recipe.parallel.processes == 1:
        return plan_text(plan, timed=device.type == "cpu")
    return f"{run_text(plan)}\n{layout_text(plan_layout(recipe, recipe_config(recipe), device))}"


def dry_run(recipe: PretrainRecipe | SFTRecipe) -> Plan:
    """Predicted parameters, FLOPs, memory and time, of one process. Raises UserError as the run would."""
    set_threads(recipe.train)
    check_model(recipe.model, recipe.lora if isinstance(recipe, SFTRecipe) else None)
    check_length(recipe.model, recipe.data)
    check_pieces(recipe.data.sequence_length, recipe.parallel.context)
    return predict(recipe_config(recipe), recipe, device=_device(recipe))


def _device(recipe: PretrainRecipe | SFTRecipe) -> torch.device:
    section = recipe.parallel
    return find_device(recipe.device, min(section.processes, ranks_per_node(section)))


def recipe_config(recipe: PretrainRecipe | SFTRecipe) -> ModelConfig:
    """The config of the model that the recipe trains. Raises UserError as the run would."""
    return model_config(recipe.model, _vocabulary(recipe), length=recipe.data.sequence_length)


def _vocabulary(recipe: PretrainRecipe | SFTRecipe) -> int:
    if isinstance(recipe, SFTRecipe):
        return len(tokenizer_at(recipe.tokenizer_path))
    path = recipe.tokenizer.path or recipe.model.path
    return len(load_tokenizer(path)) if path is not None else recipe.tokenizer.vocab_size
