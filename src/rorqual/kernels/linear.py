"""Products of rows with weights: a linear layer's, and those of experts with the rows that chose them.

M rows, K in, N out, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu

FEW = 256  # rows up to which oneDNN, which packs the weights each time, is slower


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] → [..., N]."""
    rows = x.numel() // x.shape[-1]
    if rows > FEW or not _usable(x, weight, *(() if bias is None else (bias,))):
        return linear_reference(x, weight, bias)
    flat = x.reshape(rows, -1)
    ends = torch.tensor([rows], dtype=torch.int32)
    return _few_rows(flat, weight.unsqueeze(0), bias, ends).view(*x.shape[:-1], -1)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, K] sorted by expert, expert e's rows ending at ends[e] (int32 [E]), weight [E, N, K] → [M, N]."""
    if len(x) > FEW * len(weight) or not _usable(x, weight):
        return grouped_linear_reference(x, weight, ends)
    return _few_rows(x, weight, None, ends)


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _usable(x: Tensor, *others: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.shape[-1] % 2 == 0
        and not torch.is_grad_enabled()
        and cpu.usable(x, *others)
        and all(t.is_contiguous() for t in others)
        and cpu.has_dot_products()
    )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Weights are read once, as they lie, and packed in the processor's cache on the way (product.cpp)."""
    E, N, K = weight.shape
    out = x.new_empty(len(x), N)
    cpu.call("few_rows", x.dtype, x, x.stride(0), weight, bias, ends, E, N, K, out)
    return out
