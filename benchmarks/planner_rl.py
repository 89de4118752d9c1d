"""Seconds of RL steps as the planner predicts them on this machine, and as they come out.

Three recipes: SmolLM2-135M as recipes/r1-zero-smollm2.toml trains it, with fewer answers; a mixture of experts of the
speedrun's size from random weights, with a reference model and two updates a step; and a small dense model whose
rollouts are sampled from FP8 weights. Each is predicted from the calibration alone, from it with the lengths that come
out (what the costs are worth without guessing lengths), and from a rehearsal of six steps; then it runs on.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, program, report
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine.calibrate import calibrate_engine
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cpu_time import costs_here, keep
from rorqual.plan.engine_time import engine_costs_here, keep_engine_costs
from rorqual.plan.rehearsal import RehearsedStep, RLRehearsal
from rorqual.plan.rl_here import RLCosts, plan_rl_here, step_parts
from rorqual.plan.rl_plan import Lengths
from rorqual.recipe import RLRecipe, TokenizerSection, load_recipe, parse_recipe
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rehearse import measured_step
from rorqual.rl.rl_run import prompt_tokens
from rorqual.speedrun.level import LEVELS, MODEL
from rorqual.train.build_model import build_model, tokenizer_of
from rorqual.train.calibrate import calibrate

REHEARSED = 6
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


def from_scratch(folder: Path, sizes: dict[str, Any]) -> Path:
    """A model of random weights whose answers end after a few tens of tokens, some at the limit."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        ["1 + 2 = 3"], TokenizerSection(vocab_size=1200, whole_numbers=900, special_tokens=TAGS)
    )
    size = len(tokenizer)
    model = Transformer(ModelConfig(**sizes, vocab_size=size, eos_token_id=tokenizer.eos_token_id))
    model.head_weight.data[tokenizer.eos_token_id] *= 12  # so that now and then it is likely
    save_model(model, folder, tokenizer)
    return folder


def recipes(folder: Path, quick: bool) -> dict[str, RLRecipe]:
    smollm2 = folder / "smollm2"
    if not quick:
        import_model("smollm2", smollm2)
    small = {"environments": [section.model_dump() for section in LEVELS[0].environments], "template": "plain",
             "steps": 100, "reward": {"accuracy": 1.0, "format": 0.1, "length": 1.0}}  # fmt: skip
    grpo = {"group_size": 8, "questions_per_step": 2 if quick else 16, "max_tokens": 16 if quick else 160}
    found = {
        "mixture, KL and two updates": small | {
            "name": "mixture", "model": {"path": str(from_scratch(folder / "mixture", MODEL))},
            "grpo": grpo | {"kl": 0.01, "mini_batches": 2},
        },
        "dense, FP8 rollouts": small | {
            "name": "dense", "model": {"path": str(from_scratch(folder / "dense", DENSE))},
            "grpo": grpo | {"kl": 0.0, "rollout_weights": "fp8"},
            "optimizer": {"name": "muon", "lr": 1e-5, "muon_lr": 1e-5},
        },
    }  # fmt: skip
    parsed = {name: parse_recipe(raw, RLRecipe) for name, raw in found.items()}
    if quick:
        return parsed
    path = Path(__file__).parents[1] / "recipes" / "r1-zero-smollm2.toml"
    changes = [f"model.path={smollm2}", "grpo.questions_per_step=4", "eval_every=0"]
    return {"SmolLM2-135M": load_recipe(path, RLRecipe, changes)} | parsed


def calibrated(quick: bool) -> None:
    """The costs of this machine, unless they are kept already."""
    dtype = compute_dtype()
    if quick:
        return
    if "not calibrated" in costs_here(dtype).source:
        keep(calibrate(), dtype)
    for fp8 in (False, True):
        if "not calibrated" in engine_costs_here(dtype, fp8).source:
            keep_engine_costs(calibrate_engine(fp8=fp8), dtype, fp8)


def measure(recipe: RLRecipe, steps: int) -> dict[str, Any]:
    """Predictions, and the steps after the rehearsed ones, of one trainer: a rehearsal is a run's first steps."""
    tokenizer = tokenizer_of(recipe.model)
    environments = [open_environment(section) for section in recipe.environments]
    prompt = prompt_tokens(recipe, tokenizer, environments)
    trainer = GRPOTrainer(build_model(recipe.model, tokenizer, recipe.seed), tokenizer, environments, recipe)
    config = trainer.model.config
    first = plan_rl_here(recipe, config, prompt)
    took = [measured_step(trainer, 0.5) for _ in range(REHEARSED + steps)]
    rehearsal = RLRehearsal(prompt, tuple(took[:REHEARSED]))
    second, later = plan_rl_here(recipe, config, prompt, rehearsal), took[REHEARSED:]
    parts = vars(with_lengths(recipe, config, prompt, later))
    known = {"rollout": parts["rollout"] + parts["tail"], "training": parts["training"] + parts["log_probabilities"]}
    seconds = statistics.median(step.seconds for step in later)
    low, high = second["seconds_a_step_interval"]
    early, late = first["seconds_a_step_interval"]
    return {
        "steps_seconds": [step.seconds for step in took],
        "seconds": seconds,
        "rollout_seconds": statistics.median(step.rollout for step in later),
        "training_seconds": statistics.median(step.training for step in later),
        "mean_length": statistics.median(step.length for step in later),
        "calibrated": first["seconds_a_step"],
        "calibrated_error": first["seconds_a_step"] / seconds - 1,
        "calibrated_inside": early <= seconds <= late,
        "lengths_known": sum(parts.values()),
        "lengths_known_error": sum(parts.values()) / seconds - 1,
        "lengths_known_rollout": known["rollout"],
        "lengths_known_training": known["training"],
        "rehearsed": second["seconds_a_step"],
        "rehearsed_error": second["seconds_a_step"] / seconds - 1,
        "rehearsed_inside": low <= seconds <= high,
    }


def with_lengths(recipe: RLRecipe, config: ModelConfig, prompt: float, steps: list[RehearsedStep]) -> Any:
    """Computed parts of a step with the lengths that came out, and the share of the groups that was trained on."""
    dtype = compute_dtype(recipe.model.dtype)
    engine, fp8 = engine_costs_here(dtype), recipe.grpo.rollout_weights == "fp8"
    costs = RLCosts(costs_here(dtype), engine_costs_here(dtype, fp8), engine)
    length, spread = (statistics.median(getattr(s, name) for s in steps) for name in ("length", "spread"))
    lengths = Lengths(prompt, max(1.0, length), recipe.grpo.max_tokens, max(spread, 0.05))
    trained = statistics.median(s.trained_tokens for s in steps)
    return step_parts(recipe, config, costs, lengths, trained)


def main() -> None:
    args = arguments(__doc__)
    steps = 2 if args.quick else 8
    started = time.monotonic()
    calibrated(args.quick)
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: measure(recipe, steps) for name, recipe in recipes(Path(folder), args.quick).items()}
    kinds = ("calibrated", "lengths_known", "rehearsed")
    rows = [
        [name, f["seconds"], *(cell for kind in kinds for cell in (f[kind], f"{f[f'{kind}_error']:+.0%}"))]
        for name, f in figures.items()
    ]
    parts = [
        [name, f["mean_length"], f["rollout_seconds"], f["lengths_known_rollout"], f["training_seconds"],
         f["lengths_known_training"]]
        for name, f in figures.items()
    ]  # fmt: skip
    columns = ["recipe", "s a step", "calibrated", "error", "lengths known", "error", "rehearsed", "error"]
    report(
        "planner_rl",
        args,
        {f"predicted/{name}": f["rehearsed"] / f["seconds"] for name, f in figures.items()},
        {"recipes": figures, "whole_seconds": time.monotonic() - started},
        [
            ("RL steps, as predicted and as they came out", columns, rows),
            ("Their parts", ["recipe", "tokens", "rollout s", "predicted", "training s", "predicted"], parts),
        ],
        ["torch"],
    )


if __name__ == "__main__":
    program(main)
