"""What benchmarks of reinforcement learning start from: the speedrun's mixture of experts, and GRPO from there.

With --runs FOLDER the start and every finished run are kept there, and not computed again.
"""

import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import fastest
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.datasets import open_pretrain_data, open_tokenizer
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.files import write_folder, write_text
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
NOT_KEPT = "none"
SPECIAL = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class Sizes:
    learn: int = 600  # steps of pre-training
    steps: int = 60  # of GRPO
    group: int = 16  # answers to a question, and questions a step
    problems: int = 200  # held-out ones, of each environment
    seeds: int = 3

    @property
    def last(self) -> int:
        """Steps that "at the end" is the mean of."""
        return max(1, self.steps // 6)


QUICK = Sizes(8, 2, 4, 4, 1)


@contextlib.contextmanager
def folder_of(runs: str) -> Iterator[Path]:
    """--runs, or a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(runs if runs != NOT_KEPT else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def pretrained(folder: Path, steps: int) -> tuple[Transformer, Tokenizer]:
    """The model after `steps` on the speedrun's reasoning documents."""
    start = folder / "start"
    if not start.exists():
        model, tokenizer = _pretrained(folder, steps)
        with write_folder(start) as part:
            save_model(model, part, tokenizer)
    return load_model(start, dtype=torch.float32), load_tokenizer(start)


def _pretrained(folder: Path, steps: int) -> tuple[Transformer, Tokenizer]:
    environments = [open_environment(section) for section in LEVEL.environments]
    documents = folder / "documents.jsonl"
    counts = [n // 2 for n in LEVEL.documents]
    write_documents(documents, environments, counts, [n // 4 for n in counts], seed=0)
    data = DataSection(
        sources=[Source(path=str(documents))], sequence_length=LENGTH, isolate_documents=True, valid_fraction=0.01
    )
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
    folder: Path, start: tuple[Transformer, Tokenizer], form: str, seed: int, sizes: Sizes, changes: dict[str, Any],
    update: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """GRPO from a copy of `start`: what is kept of the run.

    changes: fields of the recipe's sections that this form has. update: metrics of each step's update to keep.
    """
    kept = folder / f"{form.replace(' ', '-')}-{seed}.json"
    settings = {"sizes": asdict(sizes), "changes": changes}
    if kept.exists():
        run = json.loads(kept.read_text())
        if run.pop("settings") != settings:
            raise UserError(f"{kept}: of other settings; move it away")
        return run
    model, tokenizer = start
    raw: dict[str, Any] = {
        "name": "rl", "seed": seed, "steps": sizes.steps, "template": TEMPLATE,
        "model": {"path": "unused", "dtype": fastest()},
        "environments": [section.model_dump(exclude_none=True) for section in LEVEL.environments],
        "reward": {"accuracy": 1.0, "format": 0.1},
        "grpo": {
            "group_size": sizes.group, "questions_per_step": sizes.group, "kl": 0.0, "average": "token",
            "drop_zero_std_groups": True, "clip_high": 0.28, "max_tokens": LEVEL.max_tokens,
        },
        "optimizer": {"name": "muon", "lr": 2e-4, "muon_lr": 5e-4, "weight_decay": 0.0},
        "warmup_steps": min(3, sizes.steps), "decay": 0.3,
    }  # fmt: skip
    for section, fields in changes.items():
        raw[section] = raw.get(section, {}) | fields
    recipe = parse_recipe(raw, RLRecipe)
    environments = [open_environment(section) for section in recipe.environments]
    trainer = GRPOTrainer(copy.deepcopy(model), tokenizer, environments, recipe)
    before = statistics.mean(trainer.evaluate(sizes.problems).values())
    begin = time.perf_counter()
    found = [trainer.step(step / sizes.steps) for step in range(sizes.steps)]
    print(f"{form}, seed {seed}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    run: dict[str, Any] = {
        "form": form, "seed": seed, "before": before,
        "after": statistics.mean(trainer.evaluate(sizes.problems).values()),
        "reward": [m.rollout.reward for m in found],
        "tokens_per_second": statistics.median(m.rollout.rollout_tokens_per_second for m in found),
        **{name: [getattr(m.update, name) for m in found] for name in update},
    }  # fmt: skip
    write_text(kept, json.dumps(run | {"settings": settings}) + "\n")
    return run


def summary(runs: list[dict[str, Any]], last: int) -> list[Any]:
    """Means over the seeds of one form: pass@1 before and after, the latter by seed, reward at the end."""
    return [
        runs[0]["form"], statistics.mean(r["before"] for r in runs), statistics.mean(r["after"] for r in runs),
        ", ".join(f"{r['after']:.3f}" for r in runs),
        statistics.mean(statistics.mean(r["reward"][-last:]) for r in runs),
    ]  # fmt: skip
