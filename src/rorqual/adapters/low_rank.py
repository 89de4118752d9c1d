"""The low-rank update of one linear (Hu et al. 2021, 2106.09685, §4.1), and where in a model it can be.

    h = W·x + s·B·(A·x)      A [r, K], B [N, r], s = α/r

Shapes: K in, N out, r rank, M rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels.linear import linear
from rorqual.model.layers import Linear
from rorqual.model.transformer import Transformer
from rorqual.shapes import Float


@dataclass(frozen=True)
class LowRank:
    """An update s·B·A of a weight [N, K]."""

    A: Float[Tensor, "r K"]
    B: Float[Tensor, "N r"]
    scale: float  # s

    def __call__(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        """s·B·(A·x)"""
        return linear(linear(x, self.A) * self.scale, self.B)

    def added_to(self, weight: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """weight + s·B·A, computed in FP32, in the weight's dtype."""
        return (weight.float() + self.scale * (self.B.float() @ self.A.float())).to(weight.dtype)

    def to(self, weight: Tensor) -> "LowRank":
        """On the device of a weight, in its dtype where that is one to compute in."""
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16) else torch.bfloat16
        return LowRank(self.A.to(weight.device, dtype), self.B.to(weight.device, dtype), self.scale)


def linears(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """Path and module of every linear that can have an update: of attention, feed-forwards, shared experts and
    multi-token modules; not the head. Routed experts and routers are no linears.
    """
    for path, module in model.named_modules():
        if isinstance(module, Linear) and path != "lm_head":
            yield path, module
