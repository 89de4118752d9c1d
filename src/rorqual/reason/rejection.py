"""Rejection sampling and distillation: the best of n answers become training data (R1 §2.3.3, §2.4)."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.reason.environment import Environment, open_environment
from rorqual.reason.problems import Problem
from rorqual.reason.prompts import Template, prompt_text
from rorqual.reason.rewards import Verdict, score
from rorqual.reason.rollout import derived_seed, sample_groups
from rorqual.recipe import ChatDataSection, DistillRecipe, RewardSection, SFTRecipe
from rorqual.train.run import open_run
from rorqual.train.sft import sft

BATCH = 64  # problems sampled at once


class NothingRight(UserError):
    """The teacher solved none of the problems, so there is nothing to learn from it."""


def rejection_sample(
    engine: Engine,
    environments: Sequence[Environment],
    problems: int,
    template: Template,
    reward: RewardSection,
    params: SamplingParams,
    keep_per_problem: int = 1,
    seed: int = 0,
    verdict: Verdict | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Sample `params.n` answers to each of `problems` training problems, shared among `environments` by weight, and
    keep the best.

    Kept are only right, untruncated answers, at most `keep_per_problem` different ones a problem: those of highest
    reward, among equals the shorter, since a longer one holds more detours for the same result. Each is
    {"prompt", "completion", "family", "reward", "length"}; prompt and completion are text as the model saw and wrote
    it (names of control tokens in the question broken, as rorqual.data.marks has them). `progress` is told how many
    problems are done. Raises NothingRight when no answer is right.
    """
    by_family = {e.family: e for e in environments}
    kept: list[dict[str, Any]] = []
    drawn = _draw(environments, problems, seed)
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        sampling = SamplingParams(**vars(params) | {"seed": derived_seed(seed, "rejection", start)})
        rollout = sample_groups(engine, batch, template, sampling)
        rewards = score(rollout.samples, by_family, reward, params.max_tokens, verdict)
        for q, problem in enumerate(batch):
            members = [
                i
                for i in range(q * params.n, (q + 1) * params.n)
                if rewards.correct[i] and not rollout.samples[i].truncated
            ]
            members.sort(key=lambda i: (-float(rewards.total[i]), rollout.samples[i].length))
            different = {rollout.samples[i].text: i for i in reversed(members)}  # the best of equal texts stays
            best = sorted(different.values(), key=members.index)[:keep_per_problem]
            prompt = prompt_text(problem.question, template, engine.tokenizer)
            kept += [
                {
                    "prompt": prompt,
                    "completion": rollout.texts[i],
                    "family": problem.family,
                    "reward": float(rewards.total[i]),
                    "length": rollout.samples[i].length,
                }
                for i in best
            ]
        if progress:
            progress(start + len(batch))
    if not kept:
        raise NothingRight(
            f"none of {params.n} answers to each of {len(drawn)} problems was right; take a stronger teacher, easier "
            f"environments or more samples"
        )
    return kept


def distill(recipe: DistillRecipe, resume: bool = False) -> Path:
    """Sample from the teacher, then fine-tune the student on what was kept; gives the run's folder.

    The samples stay in its samples.jsonl, the student's run in student/. Resuming keeps samples once written.
    Raises UserError for whatever the user can mend, Stopped after SIGINT or SIGTERM.
    """
    environments = [open_environment(section) for section in recipe.environments]
    run_dir = open_run(recipe, resume)
    samples = run_dir / "samples.jsonl"
    if not samples.exists():
        _write_lines(samples, _teach(recipe, environments))
    student = SFTRecipe(
        name="student",
        out=str(run_dir),
        seed=recipe.seed,
        track=recipe.track,
        model=recipe.model,
        data=ChatDataSection(path=str(samples), sequence_length=recipe.sequence_length),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        balance=recipe.balance,
        train=recipe.train,
    )
    sft(student, resume=student.run_dir.exists())
    return run_dir


def _teach(recipe: DistillRecipe, environments: Sequence[Environment]) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    engine = Engine(recipe.teacher)
    params = SamplingParams(temperature=recipe.temperature, max_tokens=recipe.max_tokens, n=recipe.samples)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling from the teacher", total=recipe.problems)
        return rejection_sample(
            engine,
            environments,
            recipe.problems,
            recipe.template,
            recipe.reward,
            params,
            recipe.keep_per_problem,
            recipe.seed,
            progress=lambda done: bar.update(task, completed=done),
        )


def _draw(environments: Sequence[Environment], problems: int, seed: int) -> list[Problem]:
    """Distinct training problems, as many of each environment as its weight says."""
    total = sum(e.weight for e in environments)
    bounds = [round(problems * sum(e.weight for e in environments[:k]) / total) for k in range(len(environments) + 1)]
    drawn: list[Problem] = []
    for environment, low, high in zip(environments, bounds, bounds[1:], strict=False):
        drawn += environment.problems("train", high - low, derived_seed(seed, "rejection", environment.family))
    return drawn


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); free space, then --resume") from e
