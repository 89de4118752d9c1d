"""Bytes that the optimizer keeps beside a model, from the shapes of its parameters."""

from dataclasses import dataclass

import torch

from rorqual.kernels.adamw import moment_dtype, scales
from rorqual.kernels.dtype_names import COMPUTE
from rorqual.model import ModelConfig, Transformer
from rorqual.model.parameter_kinds import is_converted, is_hidden_matrix
from rorqual.recipe import OptimizerSection

FP32 = torch.float32.itemsize
NEWTON_SCHULZ_STEPS = 5  # as train/muon.py


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state, without a few bytes a tensor for counters."""

    masters: int  # FP32 weights beside those of the model
    gradients: int  # FP32, between backward pass and step
    moments: int


def predict_state(config: ModelConfig, dtype: str, section: OptimizerSection) -> StateBytes:
    """What `Optimizer.state_bytes` (train/optimizer.py) will measure for a model that computes in `dtype`."""
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    masters = moments = 0
    for name, p in parameters.items():
        if COMPUTE[dtype] is not torch.float32 and is_converted(name, p):
            masters += FP32 * p.numel()
        if section.name == "muon" and is_hidden_matrix(name, p):
            moments += p.numel() * (FP32 if section.moments == "float32" else torch.bfloat16.itemsize)
        else:
            stored = moment_dtype(section.moments, p.numel())
            scale = FP32 * scales(p.numel()) if stored is torch.uint8 else 0
            moments += 2 * (p.numel() * stored.itemsize + scale)
    return StateBytes(masters, FP32 * sum(p.numel() for p in parameters.values()), moments)


def muon_flops(config: ModelConfig) -> float:
    """Of Muon's update of all hidden matrices: in each Newton–Schulz step X Xᵀ, its square, and that times X."""
    with torch.device("meta"):
        parameters = list(Transformer(config).named_parameters())
    found = 0.0
    for name, p in parameters:
        if is_hidden_matrix(name, p):
            rows, columns = p.shape[-2:]
            short, long = sorted((rows // 2 if name.endswith("gate_up_proj") else rows, columns))
            matrices = p.numel() // (short * long)
            found += NEWTON_SCHULZ_STEPS * matrices * (4.0 * short * short * long + 2.0 * short**3)
    return found
