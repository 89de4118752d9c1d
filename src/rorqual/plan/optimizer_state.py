"""Bytes that the optimizer keeps beside a model, from the shapes of its parameters."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rorqual.adapters.lora import add_lora
from rorqual.kernels.adamw import moment_dtype, scales
from rorqual.kernels.dtype_names import COMPUTE
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model import ModelConfig, Transformer
from rorqual.model.parameter_kinds import is_converted, is_hidden_matrix
from rorqual.process_tuning import LARGEST
from rorqual.recipe import LoRASection, OptimizerSection

FP32 = torch.float32.itemsize
NEWTON_SCHULZ_STEPS = 5  # as train/muon.py


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state, without a few bytes a tensor for counters."""

    masters: int  # FP32 weights beside those of the model
    gradients: int  # FP32, between backward pass and step
    moments: int


def predict_state(
    config: ModelConfig, dtype: str, section: OptimizerSection, lora: LoRASection | None = None
) -> StateBytes:
    """What `Optimizer.state_bytes` (train/optimizer.py) will measure for a model that computes in `dtype`."""
    with torch.device("meta"):
        model = Transformer(config)
        if lora is not None:
            add_lora(model, lora, 0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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


def adapter_bytes(config: ModelConfig, dtype: str, lora: LoRASection) -> int:
    """Of one copy of what LoRA trains."""
    return COMPUTE[dtype].itemsize * adapter_parameters(config, lora)


def adapter_parameters(config: ModelConfig, lora: LoRASection) -> int:
    return predict_state(config, "float32", OptimizerSection(), lora).gradients // FP32


def update_bytes(config: ModelConfig, section: OptimizerSection) -> tuple[int, int]:
    """What the optimizer's step needs beside state and gradients, in blocks that malloc keeps and in larger ones.

    Nothing for AdamW. For Muon (train/muon.py) the updates of all hidden matrices in FP32, copies of a momentum that is
    kept in 16 bits, and for the matrices of one shape, of which it computes all at a time, two squares; and, in blocks
    that may be large, their stack, an iterate and the next.
    """
    if section.name != "muon":
        return 0, 0
    size = fastest_dtype().itemsize
    shapes = Counter[tuple[int, int]]()
    for short, long, matrices in _hidden_matrices(config):
        shapes[short, long] += matrices
    numbers = sum(n * short * long for (short, long), n in shapes.items())
    kept, large = numbers * FP32 * (1 if section.moments == "float32" else 2), 0
    if shapes:
        (short, long), n = max(shapes.items(), key=lambda found: found[1] * found[0][0] * found[0][1])
        stacks, squares = n * short * long * (FP32 + 2 * size), 2 * size * n * short**2
        large += stacks if n * short * long * size >= LARGEST else 0
        kept += stacks - large + squares
    return kept, large


def muon_flops(config: ModelConfig) -> float:
    """Of Muon's update of all hidden matrices: in each Newton–Schulz step X Xᵀ, its square, and that times X."""
    found = 0.0
    for short, long, matrices in _hidden_matrices(config):
        found += NEWTON_SCHULZ_STEPS * matrices * (4.0 * short * short * long + 2.0 * short**3)
    return found


def muon_numbers(config: ModelConfig) -> float:
    """In all matrices that Muon updates."""
    return float(sum(short * long * matrices for short, long, matrices in _hidden_matrices(config)))


def _hidden_matrices(config: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """(short side, long side, number) of each parameter that Muon updates."""
    with torch.device("meta"):
        parameters = list(Transformer(config).named_parameters())
    for name, p in parameters:
        if is_hidden_matrix(name, p):
            rows, columns = p.shape[-2:]
            short, long = sorted((rows // 2 if name.endswith("gate_up_proj") else rows, columns))
            yield short, long, p.numel() // (short * long)
