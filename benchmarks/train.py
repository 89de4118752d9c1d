"""Training tokens/s against transformers' DeepseekV3ForCausalLM with fused AdamW: same sizes, weights and batches.

Each side first tries its own settings (precision, experts, torch.compile) for a few steps and goes on with its
fastest; the two then take turns of eight steps. Utilisation divides the same count of FLOPs by the measured matrix
peak.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import arguments, program, ratio_of_rounds, report, take_turns
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.model.checkpoint import load_model, save_model
from rorqual.plan.cost import flops_per_token
from rorqual.plan.machine import matrix_peak
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer

LR, DECAY, BETAS = 3e-4, 0.1, (0.9, 0.95)
SIZES = {
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
QUICK = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "moe_intermediate_size": 32}

Step = Callable[[Batch], float]  # trains on one batch, returns the loss


def ours(path: Path, dtype: str, compiled: bool) -> Step:
    trainer = Trainer(
        load_model(path, dtype=torch.float32),
        OptimizerSection(lr=LR, weight_decay=DECAY, betas=BETAS),
        ScheduleSection(name="constant", warmup=0),
        dtype=dtype,
        compile=compiled,
    )
    return lambda batch: trainer.step([batch], 0.5)["loss"]


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
    """One side in one setting: its own stream of the common batches, and what it measured."""

    def __init__(self, settings: dict[str, Any], step: Step, stream: Iterator[Batch], steps: int) -> None:
        self.settings, self.step, self.stream, self.steps = settings, step, stream, steps
        self.losses: list[float] = []

    def speed(self) -> float:
        """Tokens/s over a block of steps."""
        found = [next(self.stream) for _ in range(self.steps)]
        start = time.perf_counter()
        self.losses += [self.step(batch) for batch in found]
        return sum(b.inputs.numel() for b in found) / (time.perf_counter() - start)


def fastest(candidates: Iterator[Contestant], tried: dict[str, float]) -> Contestant:
    """The contestant with the best of two blocks after one to warm up; every try is noted in `tried`."""
    best, most = None, 0.0
    for contestant in candidates:
        contestant.speed()
        speed = max(contestant.speed() for _ in range(2))
        tried[" ".join(map(str, contestant.settings.values()))] = speed
        if speed > most:
            best, most = contestant, speed
    assert best is not None
    return best


def main() -> None:
    args = arguments(__doc__)
    sizes, vocabulary, size, length, rounds = SIZES, 4096, 8, 256, 7
    block = 8  # steps a turn: after the other's, a side's products and memory are not at hand at first
    compiling = [False, True]
    if args.quick:
        sizes, vocabulary, size, length, rounds, compiling, block = SIZES | QUICK, 512, 2, 32, 2, [False], 2
    config = ModelConfig(model_type="deepseek_v3", vocab_size=vocabulary, **sizes)
    set_seed(0)
    tried: dict[str, dict[str, float]] = {"rorqual": {}, "transformers": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(Transformer(config), path)

        def contestants(side: str, make: Callable[..., Step], choices: dict[str, list]) -> Iterator[Contestant]:
            for values in product(*choices.values()):
                settings = dict(zip(choices, values, strict=True))
                try:
                    contestant = Contestant(settings, make(path, **settings), batches(config, size, length), 2)
                    contestant.speed()
                except Exception as e:  # a peer's setting that does not work here is noted, not fatal
                    tried[side][" ".join(map(str, values))] = 0.0
                    print(f"{side} {settings}: {str(e).splitlines()[0][:120]}", flush=True)
                    continue
                yield contestant

        us = fastest(
            contestants("rorqual", ours, {"dtype": ["float32", "bfloat16"], "compiled": compiling}), tried["rorqual"]
        )
        them = fastest(
            contestants(
                "transformers",
                transformers_peer,
                {
                    "dtype": ["float32", "autocast", "bfloat16"],
                    "experts": ["eager", "grouped_mm"],
                    "compiled": compiling,
                },
            ),
            tried["transformers"],
        )
        us.steps = them.steps = block
        speeds = take_turns({"rorqual": us.speed, "transformers": them.speed}, rounds)
    peaks = {name: matrix_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    flops = flops_per_token(config, length)
    pairs = ratio_of_rounds(speeds["rorqual"], speeds["transformers"])
    figures: dict[str, Any] = {
        "flops_per_token": flops,
        "matrix_peak": peaks,
        "tried_tokens_per_second": tried,
        "ratio_of_rounds": pairs,
    }
    rows = []
    for name, side in (("rorqual", us), ("transformers", them)):
        peak = peaks["float32" if side.settings["dtype"] == "float32" else "bfloat16"]
        speed = statistics.median(speeds[name])
        figures[name] = {
            "settings": side.settings,
            "tokens_per_second": speed,
            "rounds": speeds[name],
            "utilisation": speed * flops / peak,
            "loss": side.losses[3],
        }
        setting = " ".join(f"{k}={v}" for k, v in side.settings.items())
        rows.append([name, setting, speed, speed * flops / 1e9, speed * flops / peak, side.losses[3]])
    ratio = figures["rorqual"]["tokens_per_second"] / figures["transformers"]["tokens_per_second"]
    columns = ["", "settings", "tokens/s", "GFLOP/s", "utilisation", "loss at step 4"]
    report(
        "train",
        args,
        {"tokens-per-second/transformers": ratio},
        figures,
        [
            (f"Training, {size}×{length} tokens a step, {flops / 1e6:.1f} MFLOP a token; peaks in GFLOP/s: "
             + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in peaks.items()), columns, rows),
            ("Settings tried (tokens/s; 0: does not run here)", ["side", "setting", "tokens/s"],
             [[side, setting, speed] for side, speeds_ in tried.items() for setting, speed in speeds_.items()]),
        ],
        ["torch", "transformers"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
