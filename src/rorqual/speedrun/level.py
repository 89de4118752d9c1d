"""Choose the difficulty of the problems by this machine's speed and the time budget.

A level is chosen by the number of pre-training tokens: problems that a slow machine can just learn are saturated on a
fast one, and those that are hard for a fast one are never learned on a slow one.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from rorqual.data.loader import Batch
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.hardware import describe_machine
from rorqual.recipe import EnvironmentSection, OptimizerSection, ScheduleSection
from rorqual.train.trainer import Trainer

MODEL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
OPTIMIZER = {"name": "muon", "lr": 2e-3, "muon_lr": 4e-3, "weight_decay": 0.01}
BATCH, LENGTH = 16, 192  # pre-training: sequences per step, tokens per sequence
WARM, TIMED = 2, 6  # warm-up and measured steps of the speed measurement


@dataclass(frozen=True)
class Level:
    """Environments with the number of documents for each, and the length limit of answers."""

    name: str
    least_tokens: float  # pre-training tokens from which on the level is chosen
    environments: tuple[EnvironmentSection, ...]
    documents: tuple[int, ...]  # per environment
    max_tokens: int  # per answer

    @property
    def describe(self) -> str:
        """The problems in one line."""
        return "; ".join(_describe(section) for section in self.environments)


def _countdown(most: int) -> EnvironmentSection:
    return EnvironmentSection(
        name="countdown",
        config={"min_numbers": 3, "max_numbers": most, "min_value": 1, "max_value": 25,
                "min_target": 1, "max_target": 100, "operators": ["+", "-", "*"]},
        prompt="make {target} from {numbers}",
        weight=2.0,
    )  # fmt: skip


def _chain(least: int, most: int) -> EnvironmentSection:
    return EnvironmentSection(
        name="chain_sum",
        config={"min_terms": least, "max_terms": most, "min_digits": 1, "max_digits": 2},
        prompt="calculate {expression}",
    )


def _graph(least: int, most: int) -> EnvironmentSection:
    return EnvironmentSection(
        name="graph_color",
        config={"min_num_vertices": least, "max_num_vertices": most, "num_colors": 3, "edge_probability": 0.4},
        prompt="color {neighbors}",
    )


LEVELS = (
    Level("first", 0, (_countdown(3), _chain(6, 7)), (60_000, 30_000), 224),
    Level("second", 5e6, (_countdown(4), _chain(6, 9), _graph(5, 8)), (60_000, 40_000, 20_000), 320),
)


def choose_level(tokens: float) -> Level:
    """The hardest level for this many pre-training tokens."""
    return [level for level in LEVELS if tokens >= level.least_tokens][-1]


def training_speed() -> float:
    """Pre-training tokens/s on this machine, measured in a few full-size steps (about 3 s)."""
    config = ModelConfig.from_dict(MODEL | {"vocab_size": 1000}, "speedrun")
    trainer = Trainer(Transformer(config), OptimizerSection(**OPTIMIZER), ScheduleSection())
    tokens = torch.randint(1000, (BATCH, LENGTH))
    documents = (torch.arange(LENGTH) // 64).expand(BATCH, LENGTH)  # of 64 tokens each
    batch = Batch(
        tokens, tokens, torch.ones(BATCH, LENGTH), (torch.arange(LENGTH) % 64).expand(BATCH, LENGTH), documents
    )
    seconds = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        trainer.step([batch], 0.5)
        seconds.append(time.perf_counter() - start)
    return BATCH * LENGTH / sorted(seconds[WARM:])[TIMED // 2]


def machine_line() -> str:
    """Processor, threads, kernels and dtype in one line."""
    machine = describe_machine()
    kernels = machine["compiled_functions"] or "none: plain PyTorch"
    dtype = dtype_name(compute_dtype())
    return f"{machine['processor']}, {machine['threads']} threads; compiled kernels: {kernels}; dtype: {dtype}"


def _describe(section: EnvironmentSection) -> str:
    what = {"countdown": "numbers", "chain_sum": "terms", "graph_color": "num_vertices"}[section.name]
    least, most = (section.config[f"{bound}_{what}"] for bound in ("min", "max"))
    what = what.removeprefix("num_")
    return f"{section.name} with {least if least == most else f'{least} to {most}'} {what}"
