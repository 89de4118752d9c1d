"""Linears that train in FP8 and other small formats (V3 §3.3); `convert.convert` puts them into a built model.

They hold the model's own parameters, FP32 or BF16, and round at every use. In eval mode they are the plain linears, so
a model is evaluated and released in the precision of its weights.
"""

from torch import Tensor

from rorqual.kernels.scaled_linear import LinearFormats, scaled_feed_forward, scaled_linear
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear, SwiGLU
from rorqual.model.moe import Experts
from rorqual.shapes import Float, Float32, Int32


class FP8Linear(Linear):
    """x·Wᵀ + b with rounded factors in all three products."""

    formats: LinearFormats

    def forward(self, input: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if not self.training:
            return super().forward(input)
        return scaled_linear(input, self.weight, self.bias, self.formats)


class FP8UpProjection(FP8Linear, UpProjection):
    """In its expanded form; the absorbed one, of decoding, takes the weight as it is."""


class FP8SwiGLU(SwiGLU):
    """Keeps the input and gate and up in FP8, and computes their product again in the backward pass (V3 §3.3.3)."""

    formats: LinearFormats

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        if not self.training:
            return super().forward(x)
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return scaled_feed_forward(x.reshape(-1, x.shape[-1]), *weights, None, self.formats).view_as(x)


class FP8Experts(Experts):
    formats: LinearFormats

    def forward(
        self, x: Float[Tensor, "M D"], weights: Float32[Tensor, " M"], ends: Int32[Tensor, " E"]
    ) -> Float[Tensor, "M D"]:
        if not self.training:
            return super().forward(x, weights, ends)
        return scaled_feed_forward(x, self.gate_up_proj, None, self.down_proj, ends, self.formats, weights)
