"""The precisions a recipe can name: which number format each factor of a linear takes."""

from dataclasses import dataclass, replace

from rorqual.kernels.number_formats import (
    E5M6_TILE,
    FP8_BLOCK,
    FP8_TENSOR,
    FP8_TILE,
    MXFP4,
    MXFP8,
    NVFP4,
    NumberFormat,
    with_powers_of_two,
)
from rorqual.kernels.scaled_linear import LinearFormats


@dataclass(frozen=True)
class Precision:
    """Formats of a model's linears; those of routed experts and of the linear after attention may differ."""

    linear: LinearFormats
    experts: LinearFormats
    after_attention: LinearFormats
    what: str


def _same(activation: NumberFormat, weight: NumberFormat, weight_transposed: NumberFormat) -> LinearFormats:
    return LinearFormats(activation, weight, weight_transposed, gradient=activation, cached=activation)


def _precision(linear: LinearFormats, what: str, experts: LinearFormats | None = None) -> Precision:
    """The input of the linear after attention is kept in E5M6, since attention's backward pass is sensitive to it, and
    its scales are powers of two, so that going from tiles of columns to tiles of rows adds no error (V3 §3.3.3).
    """
    activation = linear.activation
    if activation.tile == FP8_TILE.tile:
        activation = activation if activation.scale == "power of two" else with_powers_of_two(activation)
    return Precision(linear, experts or linear, replace(linear, activation=activation, cached=E5M6_TILE), what)


def _experts_in(weight: NumberFormat) -> LinearFormats:
    """FP8 but for weights, which the input gradient takes as the forward pass does."""
    return _same(FP8_TILE, weight, weight)


V3 = _same(FP8_TILE, FP8_BLOCK, FP8_BLOCK)
PRECISIONS = {
    "fp8": _precision(V3, "E4M3: 1×128 tiles of activations and gradients, 128×128 blocks of weights"),
    "fp8-ue8m0": _precision(
        _same(*(with_powers_of_two(f) for f in (FP8_TILE, FP8_BLOCK, FP8_BLOCK))),
        "as fp8, with scales that are powers of two",
    ),
    "fp8-tensor": _precision(_same(FP8_TENSOR, FP8_TENSOR, FP8_TENSOR), "E4M3 with one scale for each tensor"),
    "mxfp8": _precision(_same(MXFP8, MXFP8, MXFP8.transposed), "E4M3 with power-of-two scales for 32 values"),
    "fp8-mxfp4": _precision(V3, "as fp8, with weights of routed experts in MXFP4", _experts_in(MXFP4)),
    "fp8-nvfp4": _precision(V3, "as fp8, with weights of routed experts in NVFP4", _experts_in(NVFP4)),
}
