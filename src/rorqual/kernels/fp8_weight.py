"""Weights that stay in FP8: E4M3 codes with a scale for every block, as in DeepSeek's releases (V3 §3.3.2).

Products dequantise one weight at a time, of experts only those that have rows (linear.py). Activations are not rounded.
N out, K in, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels.block_scaled import decode
from rorqual.kernels.number_formats import NumberFormat
from rorqual.shapes import Float32, Int32, UInt8


@dataclass
class FP8Weight:
    """Weights [E, N, K], w = element · scale; a linear's has E = 1.

    `scales` are in the dtype of the file: FP32, or E8M0, which holds powers of two in a byte.
    """

    codes: UInt8[Tensor, "E N K"]
    scales: Tensor  # [E, b, t]
    format: NumberFormat
    starts: Int32[Tensor, " starts"] | None = (
        None  # rows at which an expert's blocks begin, where not every tile's height
    )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device


def dequantize(weight: FP8Weight, expert: int = 0) -> Float32[Tensor, "N K"]:
    """An expert's weights."""
    codes = weight.codes[expert]
    N, K = codes.shape
    return decode(codes, weight.scales[expert].float(), weight.format.within(N, K), K, weight.starts)


def dense(weight: Tensor | FP8Weight, dtype: torch.dtype) -> Tensor:
    """A linear's weight [N, K] as a tensor: an FP8 one dequantised and rounded to `dtype`, others as they are."""
    return dequantize(weight).to(dtype) if isinstance(weight, FP8Weight) else weight
