"""`--dry-run`: the plan of a recipe; nothing is trained or written."""

from rorqual.data.tokenizer import load_tokenizer
from rorqual.model import ModelConfig
from rorqual.parallel.context import check_pieces
from rorqual.plan.estimate import Plan, predict
from rorqual.recipe import PretrainRecipe, SFTRecipe
from rorqual.train.build_model import check_length, check_model, model_config, set_threads, tokenizer_of


def dry_run(recipe: PretrainRecipe | SFTRecipe) -> Plan:
    """Predicted parameters, FLOPs, memory and time (`plan_text` prints them). Raises UserError as the run would."""
    set_threads(recipe.train)
    check_model(recipe.model)
    check_length(recipe.model, recipe.data)
    check_pieces(recipe.data.sequence_length, recipe.parallel.context)
    return predict(recipe_config(recipe), recipe)


def recipe_config(recipe: PretrainRecipe | SFTRecipe) -> ModelConfig:
    """The config of the model that the recipe trains. Raises UserError as the run would."""
    return model_config(recipe.model, _vocabulary(recipe), length=recipe.data.sequence_length)


def _vocabulary(recipe: PretrainRecipe | SFTRecipe) -> int:
    if isinstance(recipe, SFTRecipe):
        return len(tokenizer_of(recipe.model))
    path = recipe.tokenizer.path or recipe.model.path
    return len(load_tokenizer(path)) if path is not None else recipe.tokenizer.vocab_size
