"""Times the engine with small models, for `rorqual plan --calibrate`."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rorqual.engine.engine import Engine
from rorqual.engine.sampling_params import SamplingParams
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.engine_time import (
    EngineCosts,
    EngineCounts,
    decode_counts,
    expected_engine_costs,
    prefill_counts,
    refresh_counts,
)
from rorqual.plan.fitting import fit
from rorqual.plan.measured_here import calibrated_on
from rorqual.precision.fp8_twin import FP8Twin

ROUNDS = 3
# (prompts, answers of each, tokens of a prompt, tokens of an answer)
WORKS = ((1, 1, 16, 24), (2, 4, 32, 12), (4, 16, 24, 8), (16, 16, 24, 5), (6, 1, 224, 1), (4, 8, 256, 8))
LATENT = {
    "model_type": "deepseek_v3", "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def models() -> Iterator[ModelConfig]:
    """Narrow and wide, of few and many layers, dense and mixtures, with small and large vocabularies."""
    for width, layers, vocabulary in ((64, 8, 512), (256, 4, 4096), (128, 2, 32768), (512, 4, 8192), (1024, 2, 2048)):
        yield ModelConfig(
            model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=max(4, width // 64),
            num_key_value_heads=max(2, width // 256), max_position_embeddings=512,
        )  # fmt: skip
    for width, layers, experts, chosen, inner in ((64, 6, 8, 2, 64), (128, 3, 8, 2, 96), (256, 3, 32, 4, 128)):
        sizes: dict[str, Any] = LATENT | {
            "vocab_size": 1000, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": 4, "n_routed_experts": experts, "num_experts_per_tok": chosen,
            "moe_intermediate_size": inner, "max_position_embeddings": 512,
        }  # fmt: skip
        yield ModelConfig(**sizes)


def calibrate_engine(dtype: str = "auto", fp8: bool = False, say: Callable[[str], None] = print) -> EngineCosts:
    """Costs of the engine on this machine, in about ten seconds. fp8: with weights in FP8, from which RL may sample."""
    chosen = list(models())[:: 1 + fp8]  # half of them do: other costs are alike
    probes = [EngineProbe(config, dtype, fp8) for config in chosen]
    for turn in range(ROUNDS):
        for probe in probes:
            probe.time()
        weights = "FP8 weights" if fp8 else "weights as they are trained"
        say(f"round {turn + 1} of {ROUNDS}: the engine with {len(probes)} models, {weights}")
    expected = expected_engine_costs(compute_dtype(dtype), fp8)
    costs = fit([pair for probe in probes for pair in probe.measured], calibrated_on(), EngineCosts, expected)
    return replace(costs, spread=math.hypot(costs.spread, statistics.mean(probe.noise for probe in probes)))


class EngineProbe:
    """A model whose answers are timed."""

    def __init__(self, config: ModelConfig, dtype: str = "auto", fp8: bool = False) -> None:
        model = Transformer(config).to(compute_dtype(dtype)).eval()
        self.twin = FP8Twin(model) if fp8 else None
        self.engine = Engine(model if self.twin is None else self.twin.model)
        generator = torch.Generator().manual_seed(0)
        self.prompts = [
            [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for _ in range(count)]
            for count, _, length, _ in WORKS
        ]
        self.counts = [work_counts(config, *work) for work in WORKS]
        if fp8:
            self.counts.append(refresh_counts(config))
        self.times: list[list[float]] = [[] for _ in self.counts]
        for i in (3, 5):  # allocate, and warm up
            self._generate(i)

    def time(self) -> None:
        """One round."""
        for i, times in enumerate(self.times):
            start = time.perf_counter()
            if i < len(WORKS):
                self._generate(i)
            elif self.twin is not None:
                self.twin.refresh()
            times.append(time.perf_counter() - start)

    def _generate(self, i: int) -> None:
        _, answers, _, length = WORKS[i]
        self.engine.generate(self.prompts[i], SamplingParams(n=answers, max_tokens=length, temperature=1.0, seed=0))

    @property
    def measured(self) -> list[tuple[EngineCounts, float]]:
        return [(counts, statistics.median(times)) for counts, times in zip(self.counts, self.times, strict=True)]

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm between rounds."""
        return statistics.mean(statistics.stdev(map(math.log, times)) for times in self.times)


def work_counts(config: ModelConfig, prompts: int, answers: int, prompt: int, length: int) -> EngineCounts:
    """Of `answers` answers to each of `prompts` prompts, whose first tokens come with the prefill."""
    counts, batch = prefill_counts(config, prompts, prompt, prompts * answers), prompts * answers
    for written in range(1, length):
        counts += decode_counts(config, batch, prompt + written)
    return counts
