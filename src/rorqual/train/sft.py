"""`rorqual sft`: supervised fine-tuning on conversations, with the loss on assistant turns only."""

import sys
from pathlib import Path

from rorqual.data.datasets import open_chat_data
from rorqual.recipe import SFTRecipe
from rorqual.train.build_model import build_model, check_length, set_threads, tokenizer_of
from rorqual.train.export import finish, train
from rorqual.train.run_folder import open_run


def sft(recipe: SFTRecipe, resume: bool = False) -> Path:
    """Run the recipe and return the run's folder, with the released model in model/.

    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    set_threads(recipe.train)
    tokenizer = tokenizer_of(recipe.model)
    check_length(recipe.model, recipe.data)
    with open_run(recipe, resume) as run_dir:
        loader, valid, samples = open_chat_data(recipe.data, tokenizer, recipe.seed)
        if samples.shortened or samples.dropped:
            print(
                f"{recipe.data.path}: {samples.shortened} samples were cut at data.sequence_length = "
                f"{recipe.data.sequence_length}, {samples.dropped} were dropped (no assistant token within it)",
                file=sys.stderr,
            )
        model = build_model(recipe.model, tokenizer, recipe.seed)
        run = train(recipe, run_dir, model, loader, valid)
        return finish(recipe, run, tokenizer)
