"""The side of rollout.py. It imports nothing of ours at first, since `rorqual` may be an older one than beside it."""

import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from workers import timed

RENAMED = {"rollout_slots": "rollout_max_num_seqs", "drop_flat_groups": "drop_zero_std_groups"}  # before → now
OTHER = RENAMED | {now: before for before, now in RENAMED.items()}


def known(raw: dict[str, Any], section: Any) -> dict[str, Any]:
    """What this side's recipes may say, by its own names: an older one has fewer fields than the run. Says what it
    drops.
    """
    found = {}
    for name, value in raw.items():
        if name not in section.model_fields and OTHER.get(name) in section.model_fields:
            name = OTHER[name]
        if name not in section.model_fields:
            print(f"{section.__name__}: {name} = {value!r} is newer and left out", file=sys.stderr)
            continue
        kind = section.model_fields[name].annotation
        found[name] = known(value, kind) if isinstance(value, dict) and hasattr(kind, "model_fields") else value
    return found


class Side:
    """The trainer of a speedrun's reinforcement learning."""

    def __init__(self, recipe_file: Path, dtype: str) -> None:
        from rorqual import recipe as recipes

        try:
            from rorqual.rl.envs.registry import open_environment
            from rorqual.rl.grpo_trainer import GRPOTrainer
            from rorqual.train.build_model import build_model, tokenizer_of
        except ModuleNotFoundError:
            from rorqual.reason.environment import open_environment
            from rorqual.reason.trainer import RLTrainer as GRPOTrainer
            from rorqual.train.prepare import build_model, tokenizer_of

        raw = known(tomllib.loads(recipe_file.read_text()), recipes.RLRecipe)
        raw["model"]["dtype"] = dtype
        recipe: Any = recipes.parse_recipe(raw, "rl", str(recipe_file))
        recipe.optimizer.lr = recipe.optimizer.muon_lr = 1e-9
        tokenizer = tokenizer_of(recipe.model)
        environments = [open_environment(section) for section in recipe.environments]
        self.trainer = GRPOTrainer(build_model(recipe.model, tokenizer, recipe.seed), tokenizer, environments, recipe)
        self.rollouts = timed(self.trainer.engine, "generate")

    def step(self) -> dict[str, float]:
        tokens, start = self.trainer.tokens, time.perf_counter()
        self.rollouts.clear()
        self.trainer.step()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "rollout": sum(self.rollouts), "tokens": self.trainer.tokens - tokens}

    def evaluate(self, problems: int) -> float:
        start = time.perf_counter()
        self.trainer.evaluate(problems)
        return time.perf_counter() - start
