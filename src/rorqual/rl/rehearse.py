"""Rehearse an RL run: its first steps, to measure lengths and seconds for the plan."""

import time
from collections.abc import Callable

from rorqual.errors import UserError
from rorqual.plan.rehearsal import RehearsedStep, RLRehearsal
from rorqual.recipe import RLRecipe
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rl_run import check_problems, prompt_tokens
from rorqual.train.build_model import build_model, tokenizer_of


def rehearse(recipe: RLRecipe, steps: int = 3, say: Callable[[str], None] = print) -> RLRehearsal:
    """The run's first steps, in memory and in this process: the same problems, answers and updates, without evaluations
    and checkpoints. Nothing is written.

    Raises UserError as the run would, and for less than one step.
    """
    if steps < 1:
        raise UserError(f"--rehearse {steps}: must be at least 1 step")
    tokenizer = tokenizer_of(recipe.model)
    environments = [open_environment(section) for section in recipe.environments]
    check_problems(recipe, tokenizer, environments)
    model = build_model(recipe.model, tokenizer, recipe.seed, lora=recipe.lora)
    trainer = GRPOTrainer(model, tokenizer, environments, recipe)
    found: list[RehearsedStep] = []
    began = time.monotonic()
    for i in range(steps):
        found.append(measured_step(trainer, _progress(recipe, i, time.monotonic() - began)))
        step = found[-1]
        say(f"step {i + 1} of {steps}: {step.seconds:.3g} s, answers of {step.length:.0f} tokens on average")
    return RLRehearsal(prompt_tokens(recipe, tokenizer, environments), tuple(found))


def measured_step(trainer: GRPOTrainer, progress: float) -> RehearsedStep:
    """Take a step, and say what it took."""
    start, before = time.monotonic(), trainer.trained_tokens
    metrics = trainer.step(progress)
    return RehearsedStep(
        length=metrics.rollout.length,
        spread=metrics.rollout.length_spread,
        truncated=metrics.rollout.truncated,
        trained_tokens=trainer.trained_tokens - before,
        rollout=metrics.rollout_seconds,
        rewards=metrics.reward_seconds,
        training=metrics.update_seconds,
        seconds=time.monotonic() - start,
    )


def _progress(recipe: RLRecipe, step: int, seconds: float) -> float:
    """As in the run."""
    if recipe.steps is not None:
        return min((step + 0.5) / recipe.steps, 1.0)
    assert recipe.seconds is not None
    return min(seconds / recipe.seconds, 1.0)
