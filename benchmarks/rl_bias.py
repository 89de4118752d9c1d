"""Balancing a mixture of experts in reinforcement learning: bias frozen, bias live, or a sequence loss.

The speedrun's mixture of experts first learns the speedrun's reasoning documents, with its bias live. From there GRPO
goes on for every seed three times over the same problems: with the correction bias as it is (frozen), going on with
V3's speed (live), and frozen with V3's sequence loss. What is kept: reward, pass@1 on held-out problems before and
after, and MaxVio, the busiest expert's load over the mean less one.
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
from fp8_rollouts import pretrained
from rorqual.model import Transformer
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.speedrun.level import LEVELS
from rorqual.speedrun.stages import TEMPLATE
from rorqual.tokenizer_protocol import Tokenizer

LEVEL = LEVELS[0]
SEEDS = 3
FORMS: dict[str, dict[str, float]] = {
    "frozen": {},
    "live": {"bias_speed": 0.001},
    "sequence loss": {"sequence_loss": 0.0001},
}


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
            "balance": FORMS[form] | {"bias_stop_at": 1.0},
            "grpo": {
                # With a KL term all groups are trained on, so that MaxVio is of all tokens.
                "group_size": group, "questions_per_step": group, "kl": 0.001, "average": "token",
                "clip_high": 0.28, "max_tokens": LEVEL.max_tokens,
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
    begin = time.perf_counter()
    found = [trainer.step(step / steps) for step in range(steps)]
    print(f"{form}, seed {seed}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return {
        "form": form, "seed": seed, "before": before,
        "after": statistics.mean(trainer.evaluate(problems).values()),
        "reward": [m.rollout.reward for m in found],
        "max_vio": [statistics.mean(m.update.max_vio_per_layer or []) for m in found],
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

    def end(run: dict[str, Any], name: str) -> float:
        return statistics.mean(run[name][-last:])

    rows = [
        [
            form, statistics.mean(r["before"] for r in own), statistics.mean(r["after"] for r in own),
            ", ".join(f"{r['after']:.3f}" for r in own), statistics.mean(end(r, "reward") for r in own),
            statistics.mean(r["max_vio"][0] for r in own),
            statistics.mean(end(r, "max_vio") for r in own),
        ]
        for form, own in by_form.items()
    ]  # fmt: skip
    frozen = rows[0]
    ratios = {
        key: value
        for row in rows[1:]
        for key, value in (
            (f"pass-at-1/{row[0].replace(' ', '-')}", frozen[2] / max(row[2], 1e-9)),
            (f"max-vio/{row[0].replace(' ', '-')}", row[6] / frozen[6]),
        )
    }
    report(
        "rl_bias", args, ratios, {"runs": runs, "steps": steps},
        [(f"{steps} steps of GRPO, {seeds} seeds",
          ["balance", "pass@1 before", "after", "by seed", "reward at the end", "MaxVio at first", "at the end"],
          rows)],
        ["torch", "reasoning-gym"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
