"""Rehearse pre-training or fine-tuning: a few steps of a recipe's size, to measure its speed for the plan."""

import time
from collections.abc import Callable

import torch

from rorqual.adapters.lora import add_lora
from rorqual.data.loader import Batch
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.rehearsal import TrainingRehearsal
from rorqual.recipe import PretrainRecipe, SFTRecipe
from rorqual.train.build_model import check_length, set_threads
from rorqual.train.dry_run import recipe_config
from rorqual.train.rng import set_seed
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import split

DOCUMENTS = 3  # of a sequence, where they are isolated


def rehearse(
    recipe: PretrainRecipe | SFTRecipe, steps: int = 3, say: Callable[[str], None] = print
) -> TrainingRehearsal:
    """Steps from random weights on random tokens, in memory and in this process: how long one takes depends on the
    sizes, not on the text. Nothing is read but the model's sizes, nothing is written.

    Raises UserError as the run would, for less than one step, and for several processes.
    """
    if steps < 1:
        raise UserError(f"--rehearse {steps}: must be at least 1 step")
    if recipe.parallel.processes > 1:
        raise UserError(
            f"--rehearse with parallel of {recipe.parallel.processes} processes: one process alone can be rehearsed; "
            "leave one of them out"
        )
    section = recipe.train
    set_threads(section)
    check_length(recipe.model, recipe.data)
    config = recipe_config(recipe)
    set_seed(recipe.seed)
    model = Transformer(config)
    if isinstance(recipe, SFTRecipe) and recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.seed)
    trainer = Trainer(
        model, recipe.optimizer, recipe.schedule, recipe.mtp, recipe.balance, dtype=recipe.model.dtype,
        ema=section.ema, compile=section.compile, precision=recipe.precision, recompute=recipe.recompute,
        notify=lambda _: None,
    )  # fmt: skip
    isolated = isinstance(recipe, SFTRecipe) or recipe.data.isolate_documents
    found: list[float] = []
    for i in range(steps):
        batch = random_batch(config, section.batch_size, recipe.data.sequence_length, isolated)
        start = time.monotonic()
        trainer.step(split(batch, section.micro_batch), 0.5)
        found.append(time.monotonic() - start)
        say(f"step {i + 1} of {steps}: {found[-1]:.3g} s")
    return TrainingRehearsal(section.batch_size * recipe.data.sequence_length, tuple(found))


def random_batch(config: ModelConfig, rows: int, length: int, isolated: bool) -> Batch:
    tokens = torch.randint(config.vocab_size, (rows, length + 1))
    each = -(-length // DOCUMENTS) if isolated else length
    places = torch.arange(length).expand(rows, length)
    documents = places // each if isolated else None
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length), places % each, documents)
