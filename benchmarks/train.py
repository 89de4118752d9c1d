"""Training tokens/s against transformers' DeepseekV3ForCausalLM with fused AdamW: same sizes, weights and batches.

Each side first tries its own settings (precision, experts, torch.compile) for a few steps and goes on with its
fastest; the two then take turns of eight steps. BF16 is tried where the processor has units for it. Utilisation divides
the same count of FLOPs by the measured matrix peak.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import arguments, dtypes, program, ratio_of_rounds, report
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cost import flops_per_token
from rorqual.plan.hardware import matrix_peak
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer
from workers import Field

LR, DECAY, BETAS = 3e-4, 0.1, (0.9, 0.95)
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 880,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,  # as wide as queries, so that both sides get torch's fused attention
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 176,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.02,
}
QUICK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 32,
}

Step = Callable[[Batch], float]  # trains on one batch, returns the loss


def ours(path: Path, dtype: str, compiled: bool) -> Step:
    trainer = Trainer(
        load_model(path, dtype=torch.float32),
        OptimizerSection(lr=LR, weight_decay=DECAY, betas=BETAS),
        ScheduleSection(name="constant", warmup=0),
        dtype=dtype,
        compile=compiled,
    )
    return lambda batch: trainer.step([batch], 0.5).loss


def transformers_peer(path: Path, dtype: str, experts: str, compiled: bool) -> Step:
    """`dtype` autocast: FP32 weights with products in BF16; bfloat16: everything in BF16, without master weights."""
    from transformers import DeepseekV3ForCausalLM

    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = DeepseekV3ForCausalLM.from_pretrained(path, dtype=stored, experts_implementation=experts).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(batch: Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            out = forward(batch.inputs, shift_labels=batch.targets, labels=batch.targets, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return out.loss.item()

    return step


def batches(config: ModelConfig, size: int, length: int) -> Iterator[Batch]:
    """Random tokens: speed does not depend on the text."""
    generator = torch.Generator().manual_seed(1)
    positions, weights = torch.arange(length).expand(size, length), torch.ones(size, length)
    while True:
        tokens = torch.randint(config.vocab_size, (size, length + 1), generator=generator)
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, positions, None)


class Contestant:
    """One side in one setting: its own stream of the common batches."""

    def __init__(self, side: str, path: Path, settings: dict[str, Any], config: ModelConfig, size: int, length: int):
        set_seed(0)
        self.step = SIDES[side](path, **settings)
        self.stream, self.losses = batches(config, size, length), []

    def speed(self, steps: int) -> float:
        """Tokens/s over a block of steps."""
        found = [next(self.stream) for _ in range(steps)]
        start = time.perf_counter()
        self.losses += [self.step(batch) for batch in found]
        return sum(b.inputs.numel() for b in found) / (time.perf_counter() - start)

    def loss(self, step: int) -> float:
        return self.losses[step]


SIDES = {"rorqual": ours, "transformers": transformers_peer}


def fastest(field: Field, side: str, choices: dict[str, list], common: tuple, tried: dict[str, float]) -> tuple:
    """The name and settings of the contestant with the best of two blocks after two to warm up; the only one of its
    side that stays. Every try is noted in `tried`, as 0 where it does not run here."""
    best, most = ("", {}), 0.0
    path, *rest = common
    for values in product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        setting = " ".join(map(str, values))
        name = f"{side} {setting}"
        field.enter(name, "train:Contestant", side, path, settings, *rest, ours=side == "rorqual")
        speeds = [field.ask(name, "speed", 2) for _ in range(4)]
        tried[setting] = max(speeds[2:]) if name in field else 0.0
        if tried[setting] > most:
            field.leave(best[0])
            best, most = (name, settings), tried[setting]
        else:
            field.leave(name)
    return best


def main() -> None:
    args = arguments(__doc__, turn=300, whole=1200)
    sizes, vocabulary, size, length, rounds = SIZES, 4096, 8, 256, 7
    block = 8  # steps a turn: after the other's, a side's products and memory are not at hand at first
    compiling = [False, True]
    if args.quick:
        sizes, vocabulary, size, length, rounds, compiling, block = SIZES | QUICK, 512, 2, 32, 2, [False], 2
    config = ModelConfig(model_type="deepseek_v3", vocab_size=vocabulary, **sizes)
    set_seed(0)
    autocast = ["autocast"] if "bfloat16" in dtypes() else []
    experts = ["eager", "grouped_mm"]
    choices = {
        "rorqual": {"dtype": dtypes(), "compiled": compiling},
        "transformers": {"dtype": dtypes() + autocast, "experts": experts, "compiled": compiling},
    }
    tried: dict[str, dict[str, float]] = {side: {} for side in choices}
    with tempfile.TemporaryDirectory() as folder, Field(args.turn_limit, args.limit) as field:
        path = Path(folder) / "model"
        save_model(Transformer(config), path)
        common = (path, config, size, length)
        best = {side: fastest(field, side, choices[side], common, tried[side]) for side in choices}
        speeds = field.turns([name for name, _ in best.values()], "speed", (block,), rounds)
        losses = {name: field.ask(name, "loss", 3) for name in speeds}
    peaks = {name: matrix_peak(getattr(torch, name)) for name in dtypes()}
    flops = flops_per_token(config, length)
    figures: dict[str, Any] = {
        "flops_per_token": flops,
        "matrix_peak": peaks,
        "tried_tokens_per_second": tried,
    }
    rows = []
    for side, (name, settings) in best.items():
        if name not in speeds:
            rows.append([side, *"–––––"])
            continue
        peak = peaks["float32" if settings["dtype"] == "float32" else "bfloat16"]
        speed = statistics.median(speeds[name])
        figures[side] = {
            "settings": settings,
            "tokens_per_second": speed,
            "rounds": speeds[name],
            "utilisation": speed * flops / peak,
            "loss": losses[name],
        }
        setting = " ".join(f"{k}={v}" for k, v in settings.items())
        rows.append([side, setting, speed, speed * flops / 1e9, speed * flops / peak, losses[name]])
    ratios = {}
    if len(speeds) == 2:
        figures["ratio_of_rounds"] = ratio_of_rounds(*(speeds[name] for name, _ in best.values()))
        speed = {side: figures[side]["tokens_per_second"] for side in best}
        ratios["tokens-per-second/transformers"] = speed["rorqual"] / speed["transformers"]
    columns = ["", "settings", "tokens/s", "GFLOP/s", "utilisation", "loss at step 4"]
    report(
        "train",
        args,
        ratios,
        figures,
        [
            (f"Training, {size}×{length} tokens a step, {flops / 1e6:.1f} MFLOP a token; peaks in GFLOP/s: "
             + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in peaks.items()), columns, rows),
            ("Settings tried (tokens/s; 0: does not run here)", ["side", "setting", "tokens/s"],
             [[side, setting, speed] for side, speeds_ in tried.items() for setting, speed in speeds_.items()]),
        ],
        ["torch", "transformers"],
        field.failed,
        field.ours,
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
