"""Building blocks of every layer."""

import torch
from torch import Tensor, nn

from rorqual.kernels.linear import linear
from rorqual.kernels.norm import rms_norm
from rorqual.kernels.swiglu import swiglu
from rorqual.shapes import Float


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in FP32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """x·Wᵀ + b."""

    def reset_parameters(self) -> None:
        # On the meta device torch would draw nothing, but import torch._dynamo for it, which takes seconds.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Rows of a table, by token."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # as above
            super().reset_parameters()


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
