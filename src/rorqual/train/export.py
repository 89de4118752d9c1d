"""Shared by pre-training and SFT: run a recipe's trainer, then write the released model and the ledger."""

from pathlib import Path

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.loader import Heldout, Loader
from rorqual.files import write_text
from rorqual.model import Transformer
from rorqual.plan.estimate import predict
from rorqual.plan.ledger import Ledger
from rorqual.recipe import PretrainRecipe, SFTRecipe
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.model_card import model_card
from rorqual.train.run_loop import TrainingRun
from rorqual.train.trainer import Trainer

EVAL_BATCHES = 32  # per validation; more changes bits per byte by less than training steps do


def train(
    recipe: PretrainRecipe | SFTRecipe, run_dir: Path, model: Transformer, loader: Loader, valid: Heldout | None
) -> TrainingRun:
    """Train the recipe to its end, resuming from the newest checkpoint. Raises as `TrainingRun.fit`."""
    section = recipe.train
    run = TrainingRun(
        run_dir=run_dir,
        section=section,
        trainer=Trainer(
            model,
            recipe.optimizer,
            recipe.schedule,
            recipe.mtp,
            recipe.balance,
            dtype=recipe.model.dtype,
            ema=section.ema,
            compile=section.compile,
        ),
        loader=loader,
        track=recipe.track,
    )
    if valid is not None:
        size = section.micro_batch or section.batch_size
        run.validate = lambda: run.trainer.bits_per_byte(valid.batches(size, EVAL_BATCHES))
    run.fit()
    return run


def finish(recipe: PretrainRecipe | SFTRecipe, run: TrainingRun, tokenizer: Tokenizer) -> Path:
    """Write model/ (weights, tokenizer, model card) and ledger.json; returns the run's folder."""
    trainer, directory = run.trainer, run.run_dir / "model"
    with trainer.released_weights():
        save_model(trainer.model, directory, tokenizer)
    predicted = predict(trainer.model.config, recipe, rows=run.loader.rows)
    ledger = Ledger(run.run_dir, predicted, trainer.dtype)
    ledger.add(recipe.kind, tokens=trainer.tokens, flops=trainer.flops, seconds=run.seconds)
    write_text(directory / "README.md", model_card(recipe, run), then="then continue with --resume")
    ledger.write()
    return run.run_dir
