"""What FP8 costs: one V3-style model trained in 16 or 32 bits, V3's FP8, FP8 with one scale a tensor, and MXFP8.

17 M parameters (latent attention, 28 experts, one multi-token module) learn English that comes with Python (see
balance.py) and reasoning documents (the speedrun's, for countdown, sums and graph colouring). Runs of one seed have the
same weights at the start and the same batches, so losses are compared run by run. The baseline is BF16, or FP32 where
BF16 is emulated. Training is chaotic: a run whose first weights differ from the baseline's by one part in a million
drifts away from it as far as the noise of the data lets it. That is the control: a format has a price where its
difference stands out of the control's. "Above both" is the difference from the mean of baseline and control.

"Smoothed" is the mean of the last 200 training steps; the interval is Student's t over the seeds. Each finished run is
kept in results/fp8_loss-CLASS/ and not run again, an interrupted one goes on from its last checkpoint; --quick trains
150 steps with one seed and keeps nothing. --only trains one run, such as fp8-1, and ends; two of them can run beside
each other with --threads 1. --arms: what is compared with the baseline, by default all.
"""

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from balance import documents
from common import arguments, fastest, program, report
from rorqual.data.datasets import open_pretrain_data, open_tokenizer
from rorqual.data.loader import Batch, Heldout, Loader
from rorqual.errors import UserError
from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cost import parameters
from rorqual.precision.convert import convert
from rorqual.recipe import (
    BalanceSection,
    DataSection,
    MTPSection,
    OptimizerSection,
    ScheduleSection,
    Source,
    TokenizerSection,
)
from rorqual.rl.envs.registry import open_environment
from rorqual.speedrun.documents import write_documents
from rorqual.speedrun.level import LEVELS
from rorqual.train import set_seed
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.trainer import Trainer

LENGTH, ROWS, VOCABULARY = 256, 4, 4096
STEPS, SEEDS, LAST = 2000, 3, 200
OPTIMIZER = OptimizerSection(lr=6e-4, weight_decay=0.1)
SCHEDULE = ScheduleSection(name="wsd", warmup=0.05, decay=0.5)
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 28,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.02,
}
FORMATS = ("fp8", "fp8-tensor", "mxfp8")
BASE, CONTROL = "baseline", "control"
ARMS = (CONTROL, *FORMATS)  # what is compared with the baseline
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t of a two-sided 95 % interval, by number of values


class Task:
    """Text, tokenizer and model size, common to all runs."""

    def __init__(self, folder: Path) -> None:
        text, reasoning = folder / "text.jsonl", folder / "reasoning.jsonl"
        with text.open("w") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents())
        environments = [open_environment(section) for section in LEVELS[1].environments]
        write_documents(reasoning, environments, [3000, 3000, 3000], [1500, 1500, 1500], seed=0)
        sources = [Source(path=str(path)) for path in (text, reasoning)]
        self.data = DataSection(sources=sources, sequence_length=LENGTH, valid_fraction=0.05)
        self.tokenizer = open_tokenizer(TokenizerSection(vocab_size=VOCABULARY), self.data)
        self.config = ModelConfig(model_type="deepseek_v3", vocab_size=len(self.tokenizer), **SIZES)
        self.cache = folder / "cache"

    def open(self, seed: int) -> tuple[Loader, Heldout]:
        loader, valid = open_pretrain_data(self.data, self.tokenizer, self.cache, seed)
        assert valid
        return loader, valid

    def trainer(self, precision: str, seed: int) -> Trainer:
        set_seed(seed)
        model = Transformer(self.config)
        if precision in FORMATS:
            convert(model, precision)
        if precision == CONTROL:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 1e-6)
        return Trainer(model, OPTIMIZER, SCHEDULE, MTPSection(), BalanceSection(), dtype=fastest())


def settings(steps: int) -> dict[str, Any]:
    """What two runs must share to be compared."""
    return {
        "steps": steps, "tokens_per_step": ROWS * LENGTH, "model": SIZES,
        "optimizer": OPTIMIZER.model_dump(mode="json"), "schedule": SCHEDULE.model_dump(mode="json"),
    }  # fmt: skip


def train(task: Task, precision: str, seed: int, steps: int, checkpoints: Checkpoints | None) -> dict[str, Any]:
    """One run: the training loss of every step and bits per byte of held-out text."""
    trainer, (loader, valid) = task.trainer(precision, seed), task.open(seed)
    losses: list[float] = []
    start = time.perf_counter()
    if checkpoints and (found := checkpoints.load_latest()):
        trainer.load(found[1], found[2]["trainer"])
        loader.load_state_dict(found[2]["loader"])
        losses, start = found[2]["losses"], start - found[2]["seconds"]
    for step in range(len(losses), steps):
        losses.append(trainer.step([loader.next(ROWS)], (step + 0.5) / steps).loss)
        if step % 100 == 99:
            passed = time.perf_counter() - start
            left = passed / (step + 1) * (steps - step - 1)
            print(f"{precision} {seed}: step {step + 1}, loss {statistics.mean(losses[-100:]):.4f}, {left:.0f} s left",
                  file=sys.stderr, flush=True)  # fmt: skip
            if checkpoints:
                checkpoints.save(step + 1, trainer.tensors(), {
                    "trainer": trainer.state(), "loader": loader.state_dict(), "losses": losses, "seconds": passed,
                })  # fmt: skip
    result: dict[str, Any] = {
        "precision": precision, "seed": seed, "settings": settings(steps), "seconds": time.perf_counter() - start,
        "bits_per_byte": trainer.bits_per_byte(valid.batches(4, 64)), "losses": [round(x, 5) for x in losses],
    }  # fmt: skip
    if precision == BASE and seed == 0:
        result["gradient_cosines"] = gradient_cosines(trainer.model, loader.next(4 * ROWS))
    return result


def gradient_cosines(model: Transformer, batch: Batch) -> dict[str, dict[str, float]]:
    """Format → layer → cosine between its gradient and the baseline's, at the trained weights."""

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        hidden = model(batch.inputs)
        share = torch.full((batch.targets.numel(),), 1 / batch.targets.numel())
        linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), share).backward()
        return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}

    exact, found = gradients(), {}
    for name in FORMATS:  # one replaces the other
        convert(model, name)
        rounded = gradients()
        layers: dict[str, list[str]] = {}
        for parameter in exact:
            parts = parameter.split(".")
            layers.setdefault(".".join(parts[1:3]) if parts[1] == "layers" else parts[-2], []).append(parameter)
        found[name] = {
            layer: float(torch.nn.functional.cosine_similarity(
                torch.cat([exact[p].flatten() for p in names]), torch.cat([rounded[p].flatten() for p in names]), dim=0
            ))
            for layer, names in layers.items()
        }  # fmt: skip
    return found


def interval(values: list[float]) -> dict[str, Any]:
    """Values of the seeds, their mean and its 95 % interval."""
    mean = statistics.mean(values)
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"seeds": values, "mean": mean, "interval": None if half is None else [mean - half, mean + half]}


def smoothed(run: dict[str, Any], last: int) -> float:
    return statistics.mean(run["losses"][-last:])


def draw(runs: dict[tuple[str, int], dict[str, Any]], dest: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), dpi=160, layout="constrained")
    colours = dict(zip((BASE, *ARMS), ("#333333", "#9aa3ad", "#2767c9", "#d95f1e", "#14866a"), strict=True))

    def smooth(values: torch.Tensor) -> tuple[range, torch.Tensor]:
        window = max(1, len(values) // 20)
        found = values.unfold(0, window, max(1, window // 10)).mean(1)
        return range(window, len(values) + 1, max(1, window // 10)), found

    for precision, colour in colours.items():
        seeds = [seed for name, seed in runs if name == precision and (BASE, seed) in runs]
        if not seeds:
            continue
        losses = torch.tensor([runs[precision, seed]["losses"] for seed in seeds])
        left.plot(*smooth(losses.mean(0)), color=colour, label=precision, linewidth=1)
        if precision != BASE:
            base = torch.tensor([runs[BASE, seed]["losses"] for seed in seeds])
            for row in losses - base:
                right.plot(*smooth(row), color=colour, linewidth=0.6, alpha=0.45)
            right.plot(*smooth((losses - base).mean(0)), color=colour, linewidth=1.6, label=precision)
    left.set(xlabel="step", ylabel="training loss (nats), smoothed")
    right.set(xlabel="step", ylabel="above the same seed's baseline (nats)")
    right.axhline(0, color="#333333", linewidth=0.8)
    right.axhspan(-0.004, 0.004, color="#dfe4ea", zorder=0, label="±0.0040")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(dest)


def run_of(task: Task, precision: str, seed: int, steps: int, kept: Path | None) -> dict[str, Any]:
    """A run, from its file where it is kept. Raises UserError for one that was trained with other settings."""
    path = kept / f"{precision}-{seed}.json" if kept else None
    if path and path.exists():
        run = json.loads(path.read_text())
        if run.get("settings") != settings(steps):
            raise UserError(f"{path}: trained with other settings; move it away")
        return run
    folder = path.with_suffix(".run") if path else None
    run = train(task, precision, seed, steps, Checkpoints(folder, keep=1) if folder else None)
    if path and folder:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run) + "\n")
        os.replace(part, path)
        shutil.rmtree(folder)
    return run


def main() -> None:
    args = arguments(__doc__, threads="0 (all)", only="all runs", arms=",".join(ARMS))
    arms = tuple(args.arms.split(","))
    if unknown := set(arms) - set(ARMS):
        raise UserError(f"--arms {args.arms}: there is no {min(unknown)}; choose among {', '.join(ARMS)}")
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    steps, seeds = (150, 1) if args.quick else (STEPS, SEEDS)
    last = min(LAST, steps // 3)
    kept = args.out.with_suffix("") if args.out else None
    with tempfile.TemporaryDirectory() as folder:
        task = Task(Path(folder))
        all_runs = {f"{name}-{seed}": (name, seed) for seed in range(seeds) for name in (BASE, *arms)}
        if args.only != "all runs":
            if args.only not in all_runs:
                raise UserError(f"--only {args.only}: there is no such run; say one of {', '.join(all_runs)}")
            run_of(task, *all_runs[args.only], steps, kept)
            return
        runs = {(name, seed): run_of(task, name, seed, steps, kept) for name, seed in all_runs.values()}
    if args.out:
        draw(runs, args.out.with_suffix(".png"))
    base = [smoothed(runs[BASE, seed], last) for seed in range(seeds)]
    spread = statistics.stdev(base) if seeds > 1 else None
    figures: dict[str, Any] = {
        "baseline_dtype": fastest(), "parameters": parameters(task.config)[0], "steps": steps,
        "tokens": steps * ROWS * LENGTH, "baseline_loss": {"seeds": base, "spread": spread},
        "relative_loss_difference": {}, "nats_difference": {}, "nats_above_both": {}, "bits_per_byte": {},
        "gradient_cosines": runs[BASE, 0]["gradient_cosines"],
    }  # fmt: skip
    rows: list[list[Any]] = []
    for name in (BASE, *arms):
        found = [runs[name, seed] for seed in range(seeds)]
        nats = interval([smoothed(run, last) - b for run, b in zip(found, base, strict=True)])
        relative = interval([n / b for n, b in zip(nats["seeds"], base, strict=True)])
        figures["bits_per_byte"][name] = [run["bits_per_byte"] for run in found]
        if name != BASE:
            figures["relative_loss_difference"][name], figures["nats_difference"][name] = relative, nats
        cells = [_signed(nats, 1), "–", _signed(relative, 100)] if name != BASE else ["–", "–", "–"]
        if name in FORMATS and CONTROL in arms:  # whose mean with the baseline is the surer zero
            other = [smoothed(runs[CONTROL, seed], last) for seed in range(seeds)]
            zero = [(b + c) / 2 for b, c in zip(base, other, strict=True)]
            both = interval([smoothed(run, last) - z for run, z in zip(found, zero, strict=True)])
            figures["nats_above_both"][name], cells[1] = both, _signed(both, 1)
        rows.append([
            name, f"{statistics.mean(smoothed(run, last) for run in found):.4f}", *cells,
            f"{statistics.mean(figures['bits_per_byte'][name]):.4f}",
        ])  # fmt: skip
    cosines = figures["gradient_cosines"]
    report(
        "fp8_loss", args, {}, figures,
        [
            (f"Loss of the last {last} of {steps} steps, {seeds} seeds (spread of the baseline: "
             + ("–" if spread is None else f"{spread:.4f}") + ")",
             ["", "loss", "nats above", "above both", "% above", "bits per byte"], rows),
            ("Cosine of the gradient with the baseline's, by layer", ["", *FORMATS],
             [[layer, *(f"{cosines[name][layer]:.4f}" for name in FORMATS)] for layer in cosines[FORMATS[0]]]),
        ],
        ["torch"],
    )  # fmt: skip


def _signed(found: dict[str, Any], factor: float) -> str:
    said = f"{found['mean'] * factor:+.4f}"
    if found["interval"]:
        low, high = (value * factor for value in found["interval"])
        said += f" [{low:+.4f}, {high:+.4f}]"
    return said


if __name__ == "__main__":
    program(main)
