"""silu(gate) · up, rounded to tiles; in Triton one pass that keeps the product in FP32 and never writes it."""

from torch import Tensor

from rorqual.kernels import gpu
from rorqual.kernels.block_scaled import BlockScaled, Starts, quantize
from rorqual.kernels.number_formats import NumberFormat
from rorqual.kernels.swiglu import swiglu_joined
from rorqual.shapes import Float, Float32


def quantize_swiglu(
    x: Float[Tensor, "R gate_up"],
    format: NumberFormat,
    starts: Starts = None,
    *,
    weights: Float32[Tensor, " R"] | None = None,
    codes: bool = True,
    values: bool = False,
) -> BlockScaled:
    """`quantize` of `swiglu_joined(x, weights)`; x is [R, 2F], gate then up."""
    if not gpu.quantizes(x, format):
        return quantize_swiglu_reference(x, format, starts, weights=weights, codes=codes, values=values)
    from rorqual.kernels.triton.quantize import quantize_swiglu_tiles

    found, scales = quantize_swiglu_tiles(x, format, starts, format.tile[1] == 1, weights)
    return BlockScaled(format, (x.shape[0], x.shape[1] // 2), scales, starts, found, None)


def quantize_swiglu_reference(
    x: Float[Tensor, "R gate_up"],
    format: NumberFormat,
    starts: Starts = None,
    *,
    weights: Float32[Tensor, " R"] | None = None,
    codes: bool = True,
    values: bool = False,
) -> BlockScaled:
    return quantize(swiglu_joined(x, weights), format, starts, codes=codes, values=values)
