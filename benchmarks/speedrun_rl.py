"""The side of rollout.py. It imports nothing of ours at first, since `rorqual` may be an older one than beside it."""

import time
from pathlib import Path

from workers import timed


class Side:
    """The trainer of a speedrun's reinforcement learning."""

    def __init__(self, recipe_file: Path, dtype: str) -> None:
        from rorqual.reason.environment import open_environment
        from rorqual.reason.trainer import RLTrainer
        from rorqual.recipe import load_recipe
        from rorqual.train.prepare import build_model, tokenizer_of

        recipe = load_recipe(recipe_file, "rl", [f"model.dtype={dtype}"])
        recipe.optimizer.lr = recipe.optimizer.muon_lr = 1e-9
        tokenizer = tokenizer_of(recipe.model)
        environments = [open_environment(section) for section in recipe.environments]
        self.trainer = RLTrainer(build_model(recipe.model, tokenizer, recipe.seed), tokenizer, environments, recipe)
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
