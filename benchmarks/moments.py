"""The three forms of AdamW's moments: seconds of an optimizer step, of a training step, and bytes of the state.

The network of 15 M parameters of benchmarks/train.py, on random tokens. A step of the optimizer clips, updates the
weights and frees the gradients; the forms take turns.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from common import arguments, fastest, program, report, take_turns
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer
from train import BETAS, DECAY, LR, QUICK, SIZES, batches

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"moments": "float32"},
    "bfloat16": {"moments": "bfloat16"},
    "bfloat16, stochastic": {"moments": "bfloat16", "stochastic_rounding": True},
    "8bit": {"moments": "8bit"},
}


def trainer_of(config: ModelConfig, form: dict[str, Any]) -> Trainer:
    set_seed(0)
    section = OptimizerSection(lr=LR, weight_decay=DECAY, betas=BETAS, **form)
    return Trainer(Transformer(config), section, ScheduleSection(name="constant", warmup=0), dtype=fastest())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def optimizer_step(trainer: Trainer) -> float:
    """Seconds of a step on random gradients, as large as those of training."""
    for p in trainer.optimizer.parameters.values():
        p.grad = torch.randn_like(p) * 1e-4
    trainer.optimizer.accumulate()
    return seconds(lambda: trainer.optimizer.step(1.0))


def main() -> None:
    args = arguments(__doc__)
    sizes, vocabulary, size, length, rounds = SIZES, 4096, 8, 256, 9
    if args.quick:
        sizes, vocabulary, size, length, rounds = SIZES | QUICK, 512, 2, 32, 2
    config = ModelConfig(model_type="deepseek_v3", vocab_size=vocabulary, **sizes)
    trainers = {form: trainer_of(config, how) for form, how in FORMS.items()}
    streams = {form: batches(config, size, length) for form in FORMS}
    losses: dict[str, list[float]] = {form: [] for form in FORMS}

    def train(form: str) -> float:
        batch = next(streams[form])
        return seconds(lambda: losses[form].append(trainers[form].step([batch], 0.5).loss))

    # The first round, which warms up, is left out.
    training = take_turns({form: lambda form=form: train(form) for form in FORMS}, rounds + 1)
    updates = take_turns({form: lambda form=form: optimizer_step(trainers[form]) for form in FORMS}, rounds + 1)
    count = sum(p.numel() for p in trainers["float32"].model.parameters())
    figures: dict[str, Any] = {"parameters": count}
    rows: list[list[Any]] = []
    for form, trainer in trainers.items():
        state = trainer.optimizer.state_bytes()
        step, update = (statistics.median(found[form][1:]) for found in (training, updates))
        figures[form] = {
            "step_seconds": step,
            "optimizer_seconds": update,
            "optimizer_rounds": updates[form][1:],
            "state_bytes": asdict(state),
            "loss": losses[form][-1],
        }
        rows.append([form, update * 1e3, step * 1e3, state.moments / 1e6, f"{state.moments / count:.2f}",
                     f"{losses[form][-1]:.4f}"])  # fmt: skip
    ratios: dict[str, float] = {}
    for form in FORMS:
        if form != "float32":
            ratios[f"optimizer-speed/{form}"] = statistics.median(
                a / b for a, b in zip(updates["float32"][1:], updates[form][1:], strict=True)
            )
    columns = ["moments", "optimizer ms", "step ms", "moments MB", "bytes a parameter", f"loss at step {rounds + 1}"]
    title = f"AdamW on {count / 1e6:.1f} M parameters, {size}×{length} tokens a step"
    report("moments", args, ratios, figures, [(title, columns, rows)], ["torch"])


if __name__ == "__main__":
    program(main)
