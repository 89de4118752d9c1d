"""Copies of a model that is trained, in fewer bits: what rollouts are sampled from (`grpo.rollout_weights`)."""

from typing import Literal, Protocol

import torch

from rorqual.model import ModelConfig, Transformer
from rorqual.precision import fp8_twin, int_twin
from rorqual.precision.fp8_twin import FP8Twin
from rorqual.precision.int_twin import IntTwin

RolloutWeights = Literal["fp8", "int8", "int4"]


class Twin(Protocol):
    """`model` samples; `refresh` rounds the weights of the original anew."""

    model: Transformer

    def refresh(self) -> None: ...


def twin_of(original: Transformer, weights: RolloutWeights, dtype: torch.dtype) -> Twin:
    """dtype: that the original computes in. Raises UserError for packed weights that are not on a CPU."""
    return FP8Twin(original) if weights == "fp8" else IntTwin(original, weights, dtype)


def twin_bytes(config: ModelConfig, weights: RolloutWeights) -> int:
    """What the rounded weights of a model of these sizes take beside it."""
    return fp8_twin.twin_bytes(config) if weights == "fp8" else int_twin.twin_bytes(config, weights)


def rounded_names(model: Transformer, weights: RolloutWeights) -> set[str]:
    """The parameters that the twin of `model` has in fewer bits."""
    return fp8_twin.rounded_names(model) if weights == "fp8" else set(int_twin.packed_names(model))
