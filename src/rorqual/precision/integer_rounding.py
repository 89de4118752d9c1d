"""Round a weight to int4 or int8, as numbers, scales and what they stand for."""

import torch
from torch import Tensor

from rorqual.kernels.quantized_linear import GROUP, unpack_numbers
from rorqual.precision.quantize import ROUNDINGS, Bits
from rorqual.shapes import Float32, UInt8

ZERO_POINT: dict[Bits, int] = {"int4": 8, "int8": 128}


def round_nearest(
    weight: Float32[Tensor, "N K"], bits: Bits
) -> tuple[UInt8[Tensor, "N K"], Float32[Tensor, "N groups"]]:
    """q and scales: for int4 one for 32 inputs, for int8 one an output."""
    q, scales = unpack_numbers(ROUNDINGS[bits](weight.unsqueeze(0)))
    return q, scales.float()


def per_input(scales: Float32[Tensor, "N groups"], K: int) -> Float32[Tensor, "N K"]:
    """The scale of every weight."""
    return scales.repeat_interleave(K if scales.shape[1] == 1 else GROUP, 1)[:, :K]


def to_grid(
    values: Float32[Tensor, "*shape"], scale: Float32[Tensor, "*shape"], bits: Bits
) -> tuple[UInt8[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    """The nearest numbers under given scales, and what they stand for."""
    zero = ZERO_POINT[bits]
    q = (torch.where(scale != 0, values / scale, 0.0).round() + zero).clamp(0, 2 * zero - 1)
    return q.to(torch.uint8), (q - zero) * scale


def dequantized(q: UInt8[Tensor, "N K"], scales: Float32[Tensor, "N groups"], bits: Bits) -> Float32[Tensor, "N K"]:
    return (q.float() - ZERO_POINT[bits]) * per_input(scales, q.shape[1])


def output_error(error: Float32[Tensor, "N K"], gram: Float32[Tensor, "K K"] | None) -> float:
    """‖X·errorᵀ‖² for inputs X with XᵀX = gram; without inputs ‖error‖²."""
    return float((error * (error if gram is None else error @ gram)).sum(dtype=torch.float64).clamp(min=0))
