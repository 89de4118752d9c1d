"""Reinforcement learning whose rollouts are sampled in FP8, against rollouts from the weights that are trained.

The speedrun's mixture of experts first learns the speedrun's reasoning documents; from there GRPO goes on twice for
every seed, with rollouts from the trained weights and from their FP8 twin, corrected by truncated importance sampling.
What is kept: the mismatch of every step, the reward, pass@1 on held-out problems before and after, and tokens a second.
"""

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, fastest, program, report
from rorqual.data.datasets import open_pretrain_data, open_tokenizer
from rorqual.model import Transformer
from rorqual.recipe import (
    BalanceSection,
    DataSection,
    ModelSection,
    MTPSection,
    OptimizerSection,
    RLRecipe,
    ScheduleSection,
    Source,
    TokenizerSection,
    parse_recipe,
)
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.speedrun.documents import LARGEST, write_documents
from rorqual.speedrun.level import BATCH, LENGTH, LEVELS, MODEL, OPTIMIZER
from rorqual.speedrun.stages import TEMPLATE
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train import set_seed
from rorqual.train.build_model import build_model
from rorqual.train.number_init import start_numbers
from rorqual.train.trainer import Trainer

LEVEL = LEVELS[0]
SEEDS = 3
SPECIAL = ["<think>", "</think>", "<answer>", "</answer>"]
FORMS: dict[str, dict[str, Any]] = {"as trained": {}, "fp8": {"rollout_weights": "fp8"}}
MISMATCH = ("mismatch_logprob", "mismatch_kl", "importance_truncated", "routers_differ")


def pretrained(folder: Path, steps: int) -> tuple[Transformer, Tokenizer]:
    environments = [open_environment(section) for section in LEVEL.environments]
    documents = folder / "documents.jsonl"
    counts = [n // 2 for n in LEVEL.documents]
    write_documents(documents, environments, counts, [n // 4 for n in counts], seed=0)
    source = Source(path=str(documents))
    data = DataSection(sources=[source], sequence_length=LENGTH, isolate_documents=True, valid_fraction=0.01)
    section = TokenizerSection(vocab_size=LARGEST + 300, whole_numbers=LARGEST + 1, special_tokens=SPECIAL)
    tokenizer = open_tokenizer(section, data)
    loader, _ = open_pretrain_data(data, tokenizer, folder / "cache", 0)
    set_seed(0)
    model = build_model(ModelSection(config=MODEL), tokenizer, 0)
    start_numbers(model, tokenizer)
    schedule = ScheduleSection(name="wsd", warmup=0.02, decay=0.4, final=0.02)
    optimizer: dict[str, Any] = OPTIMIZER
    trainer = Trainer(
        model, OptimizerSection(**optimizer), schedule, MTPSection(), BalanceSection(), dtype=fastest()
    )  # fmt: skip
    for step in range(steps):
        loss = trainer.step([loader.next(BATCH)], (step + 0.5) / steps).loss
        if step % 100 == 99:
            print(f"pre-training: step {step + 1} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
    return trainer.model, tokenizer


def reinforce(
    start: Transformer, tokenizer: Tokenizer, form: str, seed: int, steps: int, group: int, problems: int
) -> dict[str, Any]:
    recipe = parse_recipe(
        {
            "name": "rl",
            "seed": seed,
            "steps": steps,
            "model": {"path": "unused", "dtype": fastest()},
            "environments": [section.model_dump(exclude_none=True) for section in LEVEL.environments],
            "template": TEMPLATE,
            "reward": {"accuracy": 1.0, "format": 0.1},
            "grpo": FORMS[form] | {
                "group_size": group, "questions_per_step": group, "kl": 0.0, "average": "token",
                "drop_zero_std_groups": True, "clip_high": 0.28, "max_tokens": LEVEL.max_tokens,
            },
            "optimizer": {"name": "muon", "lr": 2e-4, "muon_lr": 5e-4, "weight_decay": 0.0},
            "warmup_steps": min(3, steps),
            "decay": 0.3,
        },
        RLRecipe,
    )  # fmt: skip
    environments = [open_environment(section) for section in recipe.environments]
    trainer = GRPOTrainer(copy.deepcopy(start), tokenizer, environments, recipe)
    before = statistics.mean(trainer.evaluate(problems).values())
    begin, found = time.perf_counter(), []
    for step in range(steps):
        found.append(trainer.step(step / steps))
    print(f"{form}, seed {seed}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return {
        "form": form, "seed": seed, "before": before,
        "after": statistics.mean(trainer.evaluate(problems).values()),
        "reward": [m.rollout.reward for m in found],
        "tokens_per_second": statistics.median(m.rollout.rollout_tokens_per_second for m in found),
        **{name: [getattr(m.update, name) for m in found] for name in (MISMATCH if form == "fp8" else ())},
    }  # fmt: skip


def main() -> None:
    args = arguments(__doc__, threads="0 (all)")
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    learn, steps, group, problems, seeds = (8, 2, 4, 4, 1) if args.quick else (600, 60, 16, 200, SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        start, tokenizer = pretrained(Path(folder), learn)
        runs = [
            reinforce(start, tokenizer, form, seed, steps, group, problems) for seed in range(seeds) for form in FORMS
        ]
    by_form = {form: [run for run in runs if run["form"] == form] for form in FORMS}
    last = max(1, steps // 6)
    rows = [
        [
            form, statistics.mean(r["before"] for r in own), statistics.mean(r["after"] for r in own),
            ", ".join(f"{r['after']:.3f}" for r in own),
            statistics.mean(statistics.mean(r["reward"][-last:]) for r in own),
            statistics.median(r["tokens_per_second"] for r in own),
        ]
        for form, own in by_form.items()
    ]  # fmt: skip
    mismatch: list[list[Any]] = []
    for name in MISMATCH:
        values = [[v for v in run[name] if v is not None] for run in by_form["fp8"]]
        flat = [v for own in values for v in own]
        ends = [statistics.mean(own[-last:]) for own in values if own]
        mismatch.append([name, *([statistics.mean(flat), max(flat), statistics.mean(ends)] if flat else ["–"] * 3)])
    plain, rounded = ([r["after"] for r in by_form[form]] for form in FORMS)
    ratios = {
        "pass-at-1/fp8-rollouts": statistics.mean(rounded) / max(statistics.mean(plain), 1e-9),
        "tokens-per-second/fp8-rollouts": rows[1][-1] / rows[0][-1],
    }
    report(
        "fp8_rollouts", args, ratios, {"runs": runs, "steps": steps},
        [
            (f"{steps} steps of GRPO, {seeds} seeds",
             ["rollouts", "pass@1 before", "after", "by seed", "reward at the end", "tokens/s"], rows),
            ("Mismatch of FP8 rollouts", ["", "mean", "largest", "at the end"], mismatch),
        ],
        ["torch", "reasoning-gym"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
