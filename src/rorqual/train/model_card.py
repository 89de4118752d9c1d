"""The model card, model/README.md."""

from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.plan.cost import parameters
from rorqual.recipe import PretrainRecipe, Recipe, SFTRecipe
from rorqual.train.run_folder import to_toml

if TYPE_CHECKING:
    from rorqual.train.training_run import TrainingRun


def model_card(recipe: PretrainRecipe | SFTRecipe, run: "TrainingRun") -> str:
    """Model card of a pre-training or SFT run: architecture, data, compute, losses, usage and recipe."""
    trainer = run.trainer
    config = trainer.model.config
    total, active = parameters(config)
    if isinstance(recipe, PretrainRecipe):
        sources = "\n".join(f"- `{s.path}`, weight {s.weight:g}" for s in recipe.data.sources)
        what = "pre-trained on text"
    else:
        sources = f"- `{recipe.data.path}`, loss on the assistant's turns"
        start = f"from `{recipe.model.path}`" if recipe.model.path else "from random weights"
        what = f"fine-tuned on conversations {start}"
    rows = {
        "architecture": config.model_type,
        "parameters": f"{total:,} in total, {active:,} active per token",
        "context in training": f"{recipe.data.sequence_length} tokens",
        "training tokens": f"{trainer.tokens:,}",
        "compute": f"{trainer.flops:.3g} FLOP in {run.seconds:,.0f} seconds",
        "training loss": _shown(run.newest.loss, "nats per token, last step"),
        "held-out text": _shown(run.newest.valid_bpb, "bits per byte"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""A language model {what} by Rorqual (`rorqual {recipe.kind}`), seed {recipe.seed}.

| | |
|---|---|
{table}

## Data
{sources}
"""
    return card(recipe, run.run_dir, [config.model_type], text)


def card(
    recipe: Recipe, run_dir: Path, tags: list[str], text: str, task: str = "text-generation", use: str | None = None
) -> str:
    """A model card in Markdown: Hugging Face front matter, name, `text`, `use` (None: of a language model), recipe."""
    use = (
        use
        or f"""```
rorqual generate {run_dir}/model "…"
```
or `AutoModelForCausalLM.from_pretrained` in transformers."""
    )
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{", ".join(["rorqual", *tags])}]
---
# {recipe.name}

{text}
## Use
{use}

## Recipe
```toml
{to_toml(recipe.model_dump()).strip()}
```
"""


def _shown(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.4g} {unit}"
