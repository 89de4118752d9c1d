"""Rejection sampling and distillation: the best of n answers become training data (R1 §2.3.3, §2.4)."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError, file_error
from rorqual.files import write_text
from rorqual.recipe import ChatDataSection, DistillRecipe, RewardSection, SFTRecipe
from rorqual.rl.context_limits import check_context
from rorqual.rl.envs.environment import Problem
from rorqual.rl.envs.registry import Environment, open_environment
from rorqual.rl.prompts import Template, prompt_text
from rorqual.rl.rewards import score
from rorqual.rl.rollout import derived_seed, sample_groups
from rorqual.train.build_model import check_length, check_model, tokenizer_of
from rorqual.train.run_folder import open_run
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
    start: int = 0,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Sample `params.n` answers to each of `problems` training problems, shared among `environments` by weight; gives,
    batch by batch, how many problems are done and what is kept of the batch.

    Kept are only right, untruncated answers, at most `keep_per_problem` different ones a problem: those of highest
    reward, among equals the shorter, since a longer one holds more detours for the same result. Each is
    {"prompt", "completion", "family", "reward", "length"}; prompt and completion are text as the model saw and wrote
    it (names of control tokens in the question broken, as rorqual.data.special_tokens has them).
    `start`: problems that are done already; the batches after them are the same as without.
    """
    by_family = {e.family: e for e in environments}
    drawn = draw_problems(environments, problems, seed)
    for first in range(start, len(drawn), BATCH):
        batch = drawn[first : first + BATCH]
        sampling = replace(params, seed=derived_seed(seed, "rejection", first))
        rollout = sample_groups(engine, batch, template, sampling)
        rewards = score(rollout.samples, by_family, reward, params.max_tokens)
        kept: list[dict[str, Any]] = []
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
        yield first + len(batch), kept


def distill(recipe: DistillRecipe, resume: bool = False) -> Path:
    """Sample from the teacher, then fine-tune the student on what was kept; gives the run's folder.

    The samples stay in its samples.jsonl, the student's run in student/. Resuming keeps samples once written.
    Raises UserError for whatever the user can mend, Stopped after SIGINT or SIGTERM.
    """
    tokenizer_of(recipe.model)
    check_model(recipe.model)
    check_length(recipe.model, recipe, "sequence_length")
    environments = [open_environment(section) for section in recipe.environments]
    with open_run(recipe, resume) as run_dir:
        samples = run_dir / "samples.jsonl"
        if not samples.exists():
            _teach(recipe, environments, samples)
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
        sft(student, resume=True)
    return run_dir


def _teach(recipe: DistillRecipe, environments: Sequence[Environment], samples: Path) -> None:
    """Write samples.jsonl. Each batch is kept in samples.partial.jsonl as soon as it is judged."""
    from rich.console import Console
    from rich.progress import Progress

    engine = Engine(recipe.teacher)
    context = engine.model.config.max_position_embeddings
    check_context(environments, recipe.template, engine.tokenizer, context, recipe.max_tokens, "max_tokens")
    partial = samples.with_name("samples.partial.jsonl")
    start, kept = _read_partial(partial)
    params = SamplingParams(temperature=recipe.temperature, max_tokens=recipe.max_tokens, n=recipe.samples)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar, open_to_append(partial) as file:
        task = bar.add_task("sampling from the teacher", total=recipe.problems, completed=start)
        for done, rows in rejection_sample(
            engine, environments, recipe.problems, recipe.template, recipe.reward, params,
            recipe.keep_per_problem, recipe.seed, start=start,
        ):  # fmt: skip
            kept += rows
            try:
                file.write(json.dumps({"done": done, "rows": rows}, ensure_ascii=False) + "\n")
                file.flush()
            except OSError as e:
                raise file_error(partial, e, then="then continue with --resume") from e
            bar.update(task, completed=done)
    if kept:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_text(samples, lines, then="then continue with --resume")
    partial.unlink()
    if not kept:
        raise NothingRight(
            f"none of {recipe.samples} answers to each of {recipe.problems} problems was right; take a stronger "
            "teacher, easier environments or more samples"
        )


def _read_partial(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """How many problems are done, and what was kept of them; a last line cut short by a kill is cut off."""
    done, rows, whole = 0, [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                done, whole = found["done"], whole + len(line)
                rows += found["rows"]
        os.truncate(path, whole)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise file_error(path, e, "read", "then continue with --resume") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it to sample anew, then continue with --resume") from e
    return done, rows


@contextmanager
def open_to_append(path: Path) -> Iterator[TextIO]:
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as e:
        raise file_error(path, e, then="then continue with --resume") from e
    try:
        yield file
    finally:
        with suppress(OSError):  # each line was flushed, and a failure then has been told
            file.close()


def draw_problems(environments: Sequence[Environment], problems: int, seed: int) -> list[Problem]:
    """Distinct training problems, as many of each environment as its weight says."""
    total = sum(e.weight for e in environments)
    bounds = [round(problems * sum(e.weight for e in environments[:k]) / total) for k in range(len(environments) + 1)]
    drawn: list[Problem] = []
    for environment, low, high in zip(environments, bounds, bounds[1:], strict=False):
        drawn += environment.problems("train", high - low, derived_seed(seed, "rejection", environment.family))
    return drawn
