"""Memory of training recipes as predicted (`rorqual pretrain --dry-run`) and as measured.

Each recipe runs in a process of its own. Measured is the most that the process had resident by the operating system's
account (VmHWM), above the baseline: what it has resident once libraries are loaded and a step of a tiny model of the
same kind has run, with freed memory returned, before the recipe's model is built. Two steps: the moments' pages
are first written by the first. Linux only.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from common import arguments, program, report
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.estimate import predict
from rorqual.process_tuning import release_memory
from rorqual.recipe import PretrainRecipe
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer

STEPS = 2
DENSE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MIXTURE = {
    "model_type": "deepseek_v3", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16, "v_head_dim": 48, "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
# Fields of a recipe beside the model's sizes: sequence length, sequences of a step, and what else is not the default.
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"model": DENSE, "length": 512, "batch": 4},
    "dense, 4 micro-batches, EMA": {
        "model": DENSE,
        "length": 512,
        "batch": 4,
        "train": {"micro_batch": 1, "ema": 0.99},
    },
    "dense, muon": {"model": DENSE, "length": 512, "batch": 2, "optimizer": {"name": "muon"}},
    "dense, 8192 tokens a sequence": {"model": DENSE | {"num_hidden_layers": 2}, "length": 8192, "batch": 1},
    "dense, full recomputation": {"model": DENSE, "length": 512, "batch": 4, "recompute": "full"},
    "dense, vocabulary of 131072, tied": {
        "model": DENSE | {"vocab_size": 131072, "hidden_size": 256, "tie_word_embeddings": True},
        "length": 512,
        "batch": 2,
    },
    "mixture": {"model": MIXTURE, "length": 512, "batch": 4},
    "mixture, muon, 4 micro-batches": {
        "model": MIXTURE,
        "length": 512,
        "batch": 4,
        "optimizer": {"name": "muon"},
        "train": {"micro_batch": 1},
    },
    "mixture, fp8, v3, 8-bit moments": {
        "model": MIXTURE,
        "length": 512,
        "batch": 4,
        "optimizer": {"moments": "8bit"},
        "precision": "fp8",
        "recompute": "v3",
    },
    "mixture, bfloat16 moments, EMA": {
        "model": MIXTURE,
        "length": 512,
        "batch": 4,
        "optimizer": {"moments": "bfloat16"},
        "train": {"ema": 0.99},
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "num_attention_heads": 4,
}


def recipe_of(name: str) -> tuple[ModelConfig, PretrainRecipe]:
    given = RECIPES[name]
    recipe = PretrainRecipe.model_validate({
        "name": "memory",
        "model": {"config": given["model"], "dtype": given.get("dtype", "float32")},
        "data": {"sources": [{"path": "text.txt"}], "sequence_length": given["length"]},
        "optimizer": given.get("optimizer", {}),
        "train": {"steps": STEPS, "batch_size": given["batch"]} | given.get("train", {}),
        "precision": given.get("precision"),
        "recompute": given.get("recompute", "none"),
    })  # fmt: skip
    return ModelConfig(**given["model"]), recipe


def train(config: ModelConfig, recipe: PretrainRecipe, length: int, steps: int) -> None:
    """As train/training_run.py does, on random tokens."""
    set_seed(0)
    section = recipe.train
    trainer = Trainer(
        Transformer(config), recipe.optimizer, recipe.schedule, recipe.mtp, recipe.balance, dtype=recipe.model.dtype,
        ema=section.ema, precision=recipe.precision, recompute=recipe.recompute, notify=lambda _: None,
    )  # fmt: skip
    size = section.micro_batch or section.batch_size
    for _ in range(steps):
        micro_batches = [batch_of(size, length, config.vocab_size) for _ in range(section.batch_size // size)]
        trainer.step(micro_batches, 0.5)


def batch_of(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length + 1))
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length), positions, None)


def resident(field: str) -> int:
    """Linux only."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(name: str) -> dict[str, Any]:
    config, recipe = recipe_of(name)
    tiny = {k: v for k, v in TINY.items() if k != "num_attention_heads" or not config.is_mla}
    train(config.replace(**tiny, **({} if config.is_mla else {"head_dim": 16})), recipe, 32, 2)
    release_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most from here on
    train(config, recipe, recipe.data.sequence_length, STEPS)
    measured = resident("VmHWM") - before
    return {"measured": measured, "predicted": dict(predict(config, recipe)["memory"])}


def in_its_own_process(name: str) -> dict[str, Any]:
    code = "import json, sys, planner_memory; print(json.dumps(planner_memory.measure(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", "from rorqual.process_tuning import tune; tune(); " + code, name],
        capture_output=True, text=True, cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    error = found["predicted"]["total"] / found["measured"] - 1
    print(f"{name}: {found['measured'] / 1e6:.0f} MB, predicted {error:+.1%}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    args = arguments(__doc__)
    names = ["mixture, bfloat16 moments, EMA"] if args.quick else list(RECIPES)
    found = {name: in_its_own_process(name) for name in names}
    rows: list[list[Any]] = []
    ratios: dict[str, float] = {}
    for name, each in found.items():
        predicted, measured = each["predicted"]["total"], each["measured"]
        rows.append([name, measured / 1e6, predicted / 1e6, f"{predicted / measured - 1:+.1%}"])
        ratios["predicted-of-measured/" + name.replace(", ", "-").replace(" ", "-")] = predicted / measured
    tables = [("Peak memory of training, MB", ["recipe", "measured", "predicted", "error"], rows)]
    report("planner_memory", args, ratios, {"bytes": found}, tables, ["torch"])


if __name__ == "__main__":
    program(main)
