"""`rorqual pretrain`: text → tokenizer → packed tokens → a trained model."""

from pathlib import Path

from rorqual.data.datasets import open_pretrain_data, train_on_sources
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer
from rorqual.errors import file_error
from rorqual.files import write_folder
from rorqual.recipe import PretrainRecipe
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.build_model import build_model, check_length, set_threads
from rorqual.train.export import finish, train
from rorqual.train.run_folder import open_run


def pretrain(recipe: PretrainRecipe, resume: bool = False) -> Path:
    """Run the recipe and return the run's folder, with the released model in model/.

    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    set_threads(recipe.train)
    check_length(recipe.model, recipe.data)
    with open_run(recipe, resume) as run_dir:
        tokenizer = _tokenizer(recipe, run_dir)
        model = build_model(recipe.model, tokenizer, recipe.seed, recipe.data.sequence_length)
        loader, valid = open_pretrain_data(recipe.data, tokenizer, run_dir / "data", recipe.seed)
        run = train(recipe, run_dir, model, loader, valid)
        return finish(recipe, run, tokenizer)


def _tokenizer(recipe: PretrainRecipe, run_dir: Path) -> Tokenizer:
    """The recipe's tokenizer, the model's, or one trained now and saved in the run's folder."""
    for path in (recipe.tokenizer.path, recipe.model.path):
        if path is not None:
            return load_tokenizer(path)
    kept = run_dir / "tokenizer"
    if not kept.exists():
        tokenizer = train_on_sources(recipe.tokenizer, recipe.data)
        try:
            with write_folder(kept) as folder:
                save_tokenizer(tokenizer, folder)
        except OSError as e:
            raise file_error(kept, e, then="or set out to a writable place") from e
    return load_tokenizer(kept)
