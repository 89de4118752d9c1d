"""Times real training steps of small models, for `rorqual plan --calibrate`."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rorqual.data.loader import Batch
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cpu_time import Costs, expected_costs, step_counts
from rorqual.plan.fitting import fit
from rorqual.plan.measured_here import calibrated_on
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.train.trainer import Trainer

SECONDS, ROUNDS = 0.35, 4  # for the steps of a model in a round
LATENT = {
    "model_type": "deepseek_v3", "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def models() -> Iterator[tuple[ModelConfig, int, int, int, str]]:
    """(sizes, sequences, tokens of each, micro-batches, optimizer): small and larger, dense and mixtures, few and many
    tokens.
    """
    for width, layers, vocabulary, rows, length, pieces in (
        (64, 2, 512, 4, 64, 1), (64, 8, 512, 4, 64, 2), (128, 4, 1000, 16, 128, 1), (256, 4, 4096, 4, 256, 1),
        (512, 2, 8192, 2, 512, 1), (256, 2, 16384, 8, 128, 1),
    ):  # fmt: skip
        yield _dense(width, layers, vocabulary), rows, length, pieces, "adamw"
    for width, layers, experts, chosen, inner, rows, length, pieces in (
        (64, 4, 8, 2, 64, 4, 64, 1), (128, 4, 16, 3, 64, 16, 192, 1), (256, 3, 28, 3, 128, 4, 256, 1),
        (128, 6, 32, 4, 32, 8, 128, 2), (384, 2, 8, 2, 512, 4, 256, 1),
    ):  # fmt: skip
        yield _mixture(width, layers, experts, chosen, inner), rows, length, pieces, "adamw"
    yield _dense(256, 6, 1000), 4, 64, 1, "muon"
    yield _mixture(128, 6, 16, 2, 96), 4, 128, 1, "muon"


def _dense(width: int, layers: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


def _mixture(width: int, layers: int, experts: int, chosen: int, inner: int) -> ModelConfig:
    sizes: dict[str, Any] = LATENT | {
        "vocab_size": 1000, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "n_routed_experts": experts, "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    return ModelConfig(**sizes)


def calibrate(dtype: str = "auto", say: Callable[[str], None] = print) -> Costs:
    """Costs of training steps on this machine, in about half a minute.

    Models take turns: other work on the machine comes and goes, and how much it does is part of the interval.
    """
    every = [Probe(*sizes, dtype) for sizes in models()]
    for turn in range(ROUNDS):
        for probe in every:
            probe.time()
        say(f"round {turn + 1} of {ROUNDS}: steps of {len(every)} models")
    noise = statistics.mean(probe.noise for probe in every)
    expected = expected_costs(compute_dtype(dtype))
    costs = fit([(p.counts, p.seconds) for p in every], calibrated_on(), Costs, expected)
    return replace(costs, spread=math.hypot(costs.spread, noise))


class Probe:
    """A model whose training steps are timed."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, pieces: int, optimizer: str, dtype: str = "auto"
    ) -> None:
        """pieces: micro-batches of `rows` sequences."""
        itemsize = compute_dtype(dtype).itemsize
        self.counts = step_counts(config, [(rows, length)] * pieces, itemsize, ahead=True, muon=optimizer == "muon")
        section = OptimizerSection.model_validate({"name": optimizer})
        self.trainer = Trainer(
            Transformer(config), section, ScheduleSection(), MTPSection(), BalanceSection(),
            dtype=dtype_name(compute_dtype(dtype)), notify=lambda _: None,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.batches = [_batch(config.vocab_size, rows, length, generator) for _ in range(pieces)]
        self.times: list[float] = []  # a round's median each
        self.trainer.step(self.batches, 0.5)

    def time(self) -> None:
        """One round."""
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self.trainer.step(self.batches, 0.5)
            times.append(time.perf_counter() - start)
        self.times.append(statistics.median(times))

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm between rounds."""
        return statistics.stdev(map(math.log, self.times))


def _batch(vocabulary: int, rows: int, length: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    positions = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length), positions, None)
