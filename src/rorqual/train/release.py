"""The end of a run: the released model with its card, its adapter and its ledger."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.adapters.lora import merge_lora
from rorqual.adapters.peft_files import save_adapter
from rorqual.checkpoint.huggingface import save_model
from rorqual.files import write_text
from rorqual.model import Transformer
from rorqual.parallel.export import save_parts
from rorqual.plan.ledger import Ledger
from rorqual.recipe import FineTuningRecipe, PretrainRecipe, Recipe, SFTRecipe
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.model_card import model_card
from rorqual.train.traffic_report import bubble, table, traffic

if TYPE_CHECKING:
    from rorqual.train.training_run import TrainingRun


def finish(recipe: PretrainRecipe | SFTRecipe, run: "TrainingRun", tokenizer: Tokenizer) -> Path:
    """Write model/ (weights, tokenizer, model card) and ledger.json; returns the run's folder."""
    trainer, directory = run.trainer, run.run_dir / "model"
    several = run.mesh.section.processes > 1
    sent: dict[str, Any] = {}
    if several and run.steps_here:  # none where the run was over, but for its release
        sent = traffic(trainer, run.tokens_a_step, run.steps_here)
        on_cpu = trainer.device.type == "cpu"  # a GPU computes after its step is said to be over
        sent["bubble"] = bubble(trainer, run.run_dir / "figures" / "pipeline.png") if on_cpu else {}
    with trainer.released_weights(), trainer.optimizer.whole_weights():
        if several:
            save_parts(trainer.model, directory, tokenizer, run.mesh)
        else:
            release_model(trainer.model, directory, tokenizer, recipe)
    trainer.close()
    if run.mesh.rank:
        return run.run_dir
    if sent:
        print(table(sent))
        write_text(run.run_dir / "parallel.json", json.dumps(sent, indent=1), then="then continue with --resume")
    ledger = Ledger(run.run_dir, run.predicted, trainer.dtype, trainer.device.type)
    ledger.add(recipe.kind, tokens=trainer.tokens, flops=trainer.flops, seconds=run.seconds)
    ledger.joules = run.joules
    write_text(directory / "README.md", model_card(recipe, run), then="then continue with --resume")
    ledger.write()
    return run.run_dir


def release_model(model: Transformer, directory: Path, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Write a model at the end of its run, with LoRA also its adapter, in adapter/ beside the directory, and merge it.

    Raises UserError if they cannot be written.
    """
    if isinstance(recipe, FineTuningRecipe) and recipe.lora is not None:
        save_adapter(model, directory.with_name("adapter"), recipe.lora, str(recipe.model.path))
        merge_lora(model)
    save_model(model, directory, tokenizer)
