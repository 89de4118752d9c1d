"""Three ways to keep experts busy, and a mixture of experts against a dense model.

The same small model learns from the same text with the correction bias (V3 §2.1.2), with an auxiliary loss (V3
eq. 17–20, at the weight of 0.01 that Switch Transformers use) and with neither; a dense model of as many FLOPs a
token learns from it too. MaxVio is the busiest expert's load over the mean, minus 1: averaged over layers, over the
held-out text as a whole (LB §4.1). The text is English that comes with Python: its language reference and the
documentation strings of its standard library. The figure is kept beside the result.
"""

import ast
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import arguments, fastest, program, report, take_turns
from rorqual.data.datasets import open_pretrain_data, open_tokenizer
from rorqual.data.loader import Heldout
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cost import flops_per_token, parameters
from rorqual.recipe import BalanceSection, DataSection, OptimizerSection, ScheduleSection, Source, TokenizerSection
from rorqual.train import set_seed
from rorqual.train.balance import max_violations
from rorqual.train.trainer import Trainer

LENGTH, BATCH = 128, 16
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "initializer_range": 0.02,
}
# V3's γ of 0.001 is for a million steps; here a few hundred must suffice.
BALANCES = {
    "bias": BalanceSection(bias_speed=0.003, bias_stop_at=1.0, sequence_loss=0.0),
    "auxiliary loss": BalanceSection(bias_speed=0.0, sequence_loss=0.01),
    "none": BalanceSection(bias_speed=0.0, sequence_loss=0.0),
    "dense": BalanceSection(bias_speed=0.0, sequence_loss=0.0),
}


def documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_text())))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(filter(None, texts)):
            yield text


def dense_config(mixture: ModelConfig) -> ModelConfig:
    """A dense model with the width at which a token costs what it costs the mixture."""
    without = mixture.replace(n_routed_experts=None, n_shared_experts=0)
    wanted = flops_per_token(mixture, LENGTH)
    return min(
        (without.replace(intermediate_size=width) for width in range(8, 4096, 8)),
        key=lambda config: abs(flops_per_token(config, LENGTH) - wanted),
    )


class Learner:
    """One model, its balancing and what it has learned so far."""

    def __init__(self, kind: str, config: ModelConfig, data: DataSection, tokenizer: Any, cache: Path, seed: int):
        set_seed(seed)
        self.loader, valid = open_pretrain_data(data, tokenizer, cache, seed)
        assert valid
        self.valid = valid
        self.trainer = Trainer(
            Transformer(config),
            OptimizerSection(name="muon", lr=2e-3, muon_lr=0.01, weight_decay=0.1),
            ScheduleSection(name="wsd", warmup=0.05, decay=0.3),
            balance=BALANCES[kind],
            dtype=fastest(),
        )
        self.curve: list[float] = []  # MaxVio of each step's batch
        self.seconds = 0.0

    def learn(self, steps: int, total: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = self.trainer.step([self.loader.next(BATCH)], (self.trainer.steps + 0.5) / total)
            self.curve.append(statistics.mean(metrics.max_vio_per_layer or [0.0]))
        self.seconds += time.perf_counter() - start
        return self.seconds

    def results(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.trainer.bits_per_byte(self.valid.batches(BATCH)),
            "max_vio": held_out_violation(self.trainer.model, self.valid),
            "max_vio_of_batches": statistics.mean(self.curve[-len(self.curve) // 5 :]),
            "seconds": self.seconds,
        }


@torch.no_grad()
def held_out_violation(model: Transformer, valid: Heldout) -> float | None:
    loads: list[torch.Tensor] = []
    for batch, _ in valid.batches(BATCH):
        routing: list[Any] = []
        model(batch.inputs, routing=routing)
        found = [r.load for r in routing]
        loads = [a + b for a, b in zip(loads, found, strict=True)] if loads else found
    return statistics.mean(max_violations(loads)) if loads else None


def draw(runs: dict[str, list[Learner]], found: dict[str, list[dict[str, Any]]], dest: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(runs, ("#2767c9", "#d95f1e", "#14866a", "#8250c4"), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=160, layout="constrained")
    for kind, learners in runs.items():
        if kind == "dense":
            continue
        curves = torch.tensor([learner.curve for learner in learners]).mean(0)
        window = max(1, len(curves) // 40)
        smooth = curves.unfold(0, window, 1).mean(1)
        left.plot(range(window, window + len(smooth)), smooth, color=colours[kind], label=kind)
    left.set(xlabel="step", ylabel="MaxVio of a batch (mean over layers)", ylim=(0, None))
    left.legend(frameon=False)
    for place, kind in enumerate(runs):
        values = [r["bits_per_byte"] for r in found[kind]]
        right.plot([place] * len(values), values, "o", color=colours[kind], alpha=0.5)
        right.plot([place - 0.25, place + 0.25], [statistics.mean(values)] * 2, color=colours[kind])
    right.set(ylabel="bits per byte, held-out text")
    right.set_xticks(range(len(runs)), [k if k == "dense" else f"experts,\n{k}" for k in runs])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dfe4ea")
        axes.set_axisbelow(True)
    dest.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(dest)


def main() -> None:
    args = arguments(__doc__)
    steps, seeds = (6, 1) if args.quick else (600, 2)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        with text.open("w") as file:
            for document in documents():
                file.write(json.dumps({"text": document}) + "\n")
        data = DataSection(sources=[Source(path=str(text))], sequence_length=LENGTH, valid_fraction=0.1)
        tokenizer = open_tokenizer(TokenizerSection(vocab_size=2048), data)
        mixture = ModelConfig(model_type="deepseek_v3", vocab_size=len(tokenizer), **SIZES)
        configs = {kind: dense_config(mixture) if kind == "dense" else mixture for kind in BALANCES}
        runs = {
            kind: [Learner(kind, config, data, tokenizer, Path(folder) / "cache", seed) for seed in range(seeds)]
            for kind, config in configs.items()
        }
        # In turn, so that the seconds compare too.
        works = {
            f"{kind} {seed}": lambda learner=learner: learner.learn(steps // 3, steps)
            for kind, learners in runs.items()
            for seed, learner in enumerate(learners)
        }
        take_turns(works, 3)
        found = {kind: [learner.results() for learner in learners] for kind, learners in runs.items()}
    if args.out:
        draw(runs, found, args.out.with_suffix(".png"))
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {"tokens": steps * BATCH * LENGTH, "seeds": seeds}
    for kind, results in found.items():
        means = {key: statistics.mean(r[key] for r in results) if results[0][key] is not None else None
                 for key in results[0]}  # fmt: skip
        spread = statistics.stdev(r["bits_per_byte"] for r in results) if seeds > 1 else 0.0
        total, active = parameters(configs[kind])
        sizes = {"flops_per_token": flops_per_token(configs[kind], LENGTH), "parameters": total, "active": active}
        figures[kind] = means | {"bits_per_byte_deviation": spread, "seeds": results} | sizes
        name = kind if kind == "dense" else f"experts, {kind}"
        violation = "–" if kind == "dense" else means["max_vio"]
        batches = "–" if kind == "dense" else means["max_vio_of_batches"]
        rows.append([name, sizes["flops_per_token"] / 1e6, f"{total / 1e6:.2f}", violation, batches,
                     f"{means['bits_per_byte']:.4f} ± {spread:.4f}", means["seconds"]])  # fmt: skip
    bits = {kind: figures[kind]["bits_per_byte"] for kind in BALANCES}
    ratios = {
        "max-vio/auxiliary-loss": figures["auxiliary loss"]["max_vio"] / figures["bias"]["max_vio"],
        "max-vio/none": figures["none"]["max_vio"] / figures["bias"]["max_vio"],
        "bits-per-byte/auxiliary-loss": bits["auxiliary loss"] / bits["bias"],
        "bits-per-byte/none": bits["none"] / bits["bias"],
        "bits-per-byte/dense": bits["dense"] / bits["bias"],
    }
    columns = ["", "MFLOP a token", "M parameters", "MaxVio", "of batches at the end", "bits per byte", "s"]
    title = f"{steps * BATCH * LENGTH / 1e6:.2f} M tokens each, {seeds} seeds (mean ± standard deviation)"
    report("balance", args, ratios, figures, [(title, columns, rows)], ["torch"])


if __name__ == "__main__":
    program(main)
