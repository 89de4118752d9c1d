"""Rejection sampling and distillation: the best of n completions become SFT data (R1 §2.3.3, §2.4)."""

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError, file_error
from rorqual.files import write_text
from rorqual.kernels.devices import find_device
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.precision.packed_checkpoint import is_quantized
from rorqual.recipe import ChatDataSection, DistillRecipe, RewardSection, SFTRecipe
from rorqual.rl.context_limits import check_context
from rorqual.rl.envs.environment import Problem, Sample
from rorqual.rl.envs.registry import Environment, open_environment
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.prompts import Template, problem_text
from rorqual.rl.rewards import score
from rorqual.rl.rollout import derived_seed
from rorqual.train.build_model import check_length, check_model, tokenizer_of
from rorqual.train.run_folder import open_run
from rorqual.train.training_run import sft

BATCH = 64  # problems per sampling call


class NoCorrectSamples(UserError):
    """The teacher solved none of the problems, so there is no training data."""


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
    """Sample `params.n` completions for each of `problems` training problems, split among `environments` by weight.

    Yields per batch (problems done so far, samples kept of the batch). Only correct, untruncated completions are kept,
    at most `keep_per_problem` distinct ones per problem: highest reward first, then the shortest, since a longer one
    has more detours for the same result. Each is {"prompt", "completion", "family", "reward", "length"}; prompt and
    completion are the text that the model read and wrote (special-token names in the question escaped as in
    rorqual.data.special_tokens). An episode of several turns has {"messages", "tools"} instead. `start`: problems
    already done; later batches do not depend on it. Raises UserError for episodes without a chat template.
    """
    by_family = {e.family: e for e in environments}
    if template != "chat" and (several := [e.family for e in environments if e.turns > 1]):
        raise UserError(
            f"environment {several[0]} with template = {template!r}: students learn several turns in chats; set 'chat'"
        )
    drawn = draw_problems(environments, problems, seed)
    for first in range(start, len(drawn), BATCH):
        batch = drawn[first : first + BATCH]
        sampling = replace(params, seed=derived_seed(seed, "rejection", first))
        rollout = sample_rollout(engine, batch, template, sampling, by_family)
        rewards = score(rollout.samples, by_family, reward, params.max_tokens)
        kept: list[dict[str, Any]] = []
        for q, problem in enumerate(batch):
            members = [
                i
                for i in range(q * params.n, (q + 1) * params.n)
                if rewards.correct[i] and not rollout.samples[i].truncated and not rewards.skipped[i]
            ]
            members.sort(key=lambda i: (-float(rewards.total[i]), rollout.samples[i].length))
            different = {said_in(rollout.samples[i]): i for i in reversed(members)}  # of equal ones, the best
            best = sorted(different.values(), key=members.index)[:keep_per_problem]
            prompt = problem_text(problem, template, engine.require_tokenizer())
            kept += [
                (
                    {"messages": rollout.samples[i].messages, "tools": problem.tools}
                    if rollout.samples[i].turns
                    else {"prompt": prompt, "completion": rollout.texts[i]}
                )
                | {
                    "family": problem.family,
                    "reward": float(rewards.total[i]),
                    "length": rollout.samples[i].length,
                }
                for i in best
            ]
        yield first + len(batch), kept


def said_in(sample: Sample) -> str:
    """All that was said in a sample, to tell it from others."""
    return "\0".join(message["content"] or "" for message in sample.turns) or sample.text


def distill(recipe: DistillRecipe, resume: bool = False) -> Path:
    """Sample from the teacher, then fine-tune the student on the kept samples; returns the run's folder.

    Samples are written to samples.jsonl, the student's run to student/. Resuming keeps written samples.
    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    tokenizer_of(recipe.model)
    check_model(recipe.model)
    check_length(recipe.model, recipe, "sequence_length")
    environments = [open_environment(section) for section in recipe.environments]
    device = find_device(recipe.device)
    for_teacher = recipe.device  # which open_run changes to what it has found
    with open_run(recipe, resume, device) as run_dir:
        samples = run_dir / "samples.jsonl"
        if not samples.exists():
            _sample_teacher(recipe, environments, samples, for_teacher)
        student = SFTRecipe(
            name="student",
            out=str(run_dir),
            seed=recipe.seed,
            track=recipe.track,
            device=recipe.device,
            model=recipe.model,
            precision=recipe.precision,
            recompute=recipe.recompute,
            data=ChatDataSection(path=str(samples), sequence_length=recipe.sequence_length),
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            balance=recipe.balance,
            train=recipe.train,
        )
        sft(student, resume=True)
    return run_dir


def _sample_teacher(recipe: DistillRecipe, environments: Sequence[Environment], samples: Path, device: str) -> None:
    """Write samples.jsonl. Each batch is appended to samples.partial.jsonl as soon as it is scored."""
    from rich.console import Console
    from rich.progress import Progress

    engine = Engine(recipe.teacher, device=_teacher_device(recipe.teacher, device))
    context = engine.model.config.max_position_embeddings
    check_context(environments, recipe.template, engine.require_tokenizer(), context, recipe.max_tokens, "max_tokens")
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
        raise NoCorrectSamples(
            f"none of {recipe.samples} completions of each of {recipe.problems} problems is correct; use a stronger "
            "teacher, easier environments or more samples"
        )


def _teacher_device(teacher: str, name: str) -> torch.device:
    """As in the recipe; "auto" is the CPU for quantised weights, which are for one."""
    packed = is_gguf(teacher) or is_quantized(model_directory(teacher))
    return find_device("cpu" if packed and name == "auto" else name)


def _read_partial(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """(problems done, samples kept). A last line cut short by a kill is truncated away."""
    done = complete = 0  # `complete`: bytes of complete lines
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                done, complete = found["done"], complete + len(line)
                rows += found["rows"]
        os.truncate(path, complete)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise file_error(path, e, "read", "then continue with --resume") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it to sample again, then continue with --resume") from e
    return done, rows


@contextmanager
def open_to_append(path: Path) -> Generator[TextIO, None, None]:
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as e:
        raise file_error(path, e, then="then continue with --resume") from e
    try:
        yield file
    finally:
        with suppress(OSError):  # each line was flushed, and that reported any failure
            file.close()


def draw_problems(environments: Sequence[Environment], problems: int, seed: int) -> list[Problem]:
    """Distinct training problems, split among the environments in proportion to their weights."""
    total = sum(e.weight for e in environments)
    bounds = [round(problems * sum(e.weight for e in environments[:k]) / total) for k in range(len(environments) + 1)]
    drawn: list[Problem] = []
    for environment, low, high in zip(environments, bounds, bounds[1:], strict=False):
        drawn += environment.problems("train", high - low, derived_seed(seed, "rejection", environment.family))
    return drawn
