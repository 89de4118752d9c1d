"""Distillation: a teacher's best completions, with conversations mixed in, become a student's SFT data (R1 §2.4).

The teacher is a model, or `worked-solutions` (rl/worked), which never errs: R1's cold start (§2.3.1).
"""

import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, TextIO

import torch

from rorqual.data.corpus import RECORDS, find_files, read_records
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError, file_error
from rorqual.files import write_text
from rorqual.kernels.devices import find_device
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.precision.packed_checkpoint import is_quantized
from rorqual.recipe import WORKED_SOLUTIONS, ChatDataSection, DistillRecipe, MixSection, SFTRecipe
from rorqual.rl.context_limits import check_context
from rorqual.rl.envs.registry import Environment, open_environment
from rorqual.rl.rejection_sampling import KEPT, Batch, Counts, rejection_sample
from rorqual.rl.reward_scorer import RewardScorer, check_reward_model
from rorqual.rl.rollout import derived_seed
from rorqual.rl.worked_samples import check_worked, worked_batches
from rorqual.train.build_model import check_length, check_model, config_for, tokenizer_at
from rorqual.train.run_folder import has_work, open_run
from rorqual.train.training_run import sft

COUNTS = "sampling.json"


class NoCorrectSamples(UserError):
    """The teacher solved none of the problems, so there is no training data."""


def distill(recipe: DistillRecipe, resume: bool = False) -> Path:
    """Sample from the teacher, then fine-tune the student on the kept samples; returns the run's folder.

    Samples are written to samples.jsonl, the student's run to student/. Resuming keeps written samples.
    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    tokenizer = tokenizer_at(recipe.tokenizer_path)
    check_model(recipe.model, recipe.lora)
    check_length(recipe.model, recipe, "sequence_length")
    config_for(recipe.model, tokenizer, recipe.sequence_length)
    environments = [open_environment(section) for section in recipe.environments]
    if recipe.teacher == WORKED_SOLUTIONS:
        check_worked(environments)
    if recipe.reward.model is not None:
        check_reward_model(recipe.reward.model.path)
    if recipe.template != "chat" and (several := [e.family for e in environments if e.turns > 1]):
        raise UserError(
            f"environment {several[0]} with template = {recipe.template!r}: students learn several turns in chats; set "
            "'chat'"
        )
    device = find_device(recipe.device)
    for_teacher = recipe.device  # which open_run changes to what it has found
    with open_run(recipe, resume, device) as run_dir:
        samples = run_dir / "samples.jsonl"
        if not samples.exists():
            _sample(recipe, environments, samples, for_teacher)
        student = student_recipe(recipe, run_dir, samples)
        try:
            sft(student, resume=True, length_field="sequence_length")
        except UserError as e:
            if type(e) is not UserError or e.retry or has_work(run_dir / "student"):
                raise
            raise UserError(f"{e}; the samples are kept, so go on with --resume and the changed settings") from e
    return run_dir


def student_recipe(recipe: DistillRecipe, run_dir: Path, samples: Path) -> SFTRecipe:
    """Of the fine-tuning on the samples."""
    return SFTRecipe(
        name="student",
        out=str(run_dir),
        seed=recipe.seed,
        track=recipe.track,
        device=recipe.device,
        model=recipe.model,
        tokenizer=recipe.tokenizer,
        precision=recipe.precision,
        recompute=recipe.recompute,
        lora=recipe.lora,
        data=ChatDataSection(path=str(samples), sequence_length=recipe.sequence_length),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        balance=recipe.balance,
        train=recipe.train,
    )


def _sample(recipe: DistillRecipe, environments: Sequence[Environment], samples: Path, device: str) -> None:
    """Write samples.jsonl and sampling.json; a batch is appended to samples.partial.jsonl as soon as it is scored."""
    from rich.console import Console
    from rich.progress import Progress

    mixed = [row for section in recipe.mix for row in _mixed(section, recipe.seed)]
    partial = samples.with_name("samples.partial.jsonl")
    start, kept, counts = _read_partial(partial)
    batches = _batches(recipe, environments, start, device)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar, open_to_append(partial) as file:
        task = bar.add_task(f"sampling from {recipe.teacher}", total=recipe.problems, completed=start)
        for batch in batches:
            kept += batch.rows
            _add(counts, batch.counts)
            line = {"done": batch.done, "rows": batch.rows, "counts": batch.counts}
            try:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            except OSError as e:
                raise file_error(partial, e, then="then continue with --resume") from e
            bar.update(task, completed=batch.done)
    if kept:
        rows = [*kept, *mixed]
        then = "then continue with --resume"
        write_text(samples.with_name(COUNTS), json.dumps(counts | {"mixed in": len(mixed)}, indent=1) + "\n", then=then)
        write_text(samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), then=then)
    partial.unlink()
    print("\n".join(described(counts)))
    if not kept:
        raise NoCorrectSamples(
            f"none of {recipe.samples} completions of each of {recipe.problems} problems is correct and as the filter "
            "wants it; use a stronger teacher, easier environments or more samples"
        )


def described(counts: Counts) -> list[str]:
    """A line a family: kept of how many, and why others were left out."""
    lines: list[str] = []
    for family, found in counts.items():
        others = ", ".join(f"{n} {what}" for what, n in sorted(found.items()) if n and what != KEPT)
        lines.append(f"{family}: {found[KEPT]} of {sum(found.values())} completions kept" + (others and f"; {others}"))
    return lines


def _add(counts: Counts, more: Counts) -> None:
    for family, found in more.items():
        counts.setdefault(family, Counter()).update(found)


def _batches(recipe: DistillRecipe, environments: Sequence[Environment], start: int, device: str) -> Iterator[Batch]:
    if recipe.teacher == WORKED_SOLUTIONS:
        return worked_batches(recipe, environments, start, tokenizer_at(recipe.tokenizer_path))
    on = _teacher_device(recipe.teacher, device)
    engine, judge, scorer = Engine(recipe.teacher, device=on), recipe.reward.model, None
    context = engine.model.config.max_position_embeddings
    if judge is not None:
        scorer = RewardScorer.load(judge, compute_dtype(recipe.model.dtype), on)
        context = min(context, scorer.model.config.max_position_embeddings)
    check_context(environments, recipe.template, engine.require_tokenizer(), context, recipe.max_tokens, "max_tokens")
    params = SamplingParams(temperature=recipe.temperature, max_tokens=recipe.max_tokens, n=recipe.samples)
    return rejection_sample(
        engine, environments, recipe.problems, recipe.template, recipe.reward, params, recipe.keep_per_problem,
        recipe.seed, start, recipe.filter, scorer,
    )  # fmt: skip


def _mixed(section: MixSection, seed: int) -> list[dict[str, Any]]:
    """Conversations of a file, all or `samples` of them. Raises UserError for fewer."""
    rows = [dict(record) for file in find_files(section.path, RECORDS) for _, record in read_records(file)]
    if section.samples is None:
        return rows
    if section.samples > len(rows):
        raise UserError(f"mix.samples = {section.samples}: {section.path} has only {len(rows)} conversations; lower it")
    return Random(derived_seed(seed, "mix", section.path)).sample(rows, section.samples)


def _teacher_device(teacher: str, name: str) -> torch.device:
    """As in the recipe; "auto" is the CPU for quantised weights, which are for one."""
    packed = is_gguf(teacher) or is_quantized(model_directory(teacher))
    return find_device("cpu" if packed and name == "auto" else name)


def _read_partial(path: Path) -> tuple[int, list[dict[str, Any]], Counts]:
    """(problems done, samples kept, counts). A last line cut short by a kill is truncated away."""
    done = complete = 0  # `complete`: bytes of complete lines
    rows: list[dict[str, Any]] = []
    counts: Counts = {}
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                done, complete = found["done"], complete + len(line)
                rows += found["rows"]
                _add(counts, {family: Counter(known) for family, known in found.get("counts", {}).items()})
        os.truncate(path, complete)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise file_error(path, e, "read", "then continue with --resume") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it to sample again, then continue with --resume") from e
    return done, rows, counts


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
