"""Copies of a model that is trained, in fewer bits: what rollouts are sampled from (`grpo.rollout_weights`)."""

from typing import Literal, Protocol

import torch

from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.precision import fp8_twin, int_twin
from rorqual.precision.fp8_twin import FP8Twin
from rorqual.precision.int_twin import IntTwin

RolloutWeights = Literal["fp8", "int8", "int4"]


class Twin(Protocol):
    """`model` samples; `refresh` rounds the weights of the original anew."""

    model: Transformer

    def refresh(self) -> None: ...


def check_device(weights: RolloutWeights | None, device: torch.device) -> None:
    """Raises UserError for packed weights that are not on a CPU."""
    if weights in ("int8", "int4") and device.type != "cpu":
        raise UserError(
            f'grpo.rollout_weights = "{weights}": packed weights are for a CPU; set device = "cpu", take "fp8", or '
            "leave it out"
        )


def twin_of(original: Transformer, weights: RolloutWeights, dtype: torch.dtype) -> Twin:
    """dtype: that the original computes in. Raises UserError for packed weights that are not on a CPU."""
    check_device(weights, original.head_weight.device)
    return FP8Twin(original) if weights == "fp8" else IntTwin(original, weights, dtype)


def twin_bytes(config: ModelConfig, weights: RolloutWeights, dtype: torch.dtype) -> int:
    """What the twin of a model of these sizes takes beside it."""
    return fp8_twin.twin_bytes(config) if weights == "fp8" else int_twin.twin_bytes(config, weights, dtype)
