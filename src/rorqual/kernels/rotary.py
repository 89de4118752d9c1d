"""Rotary position embedding (RoFormer, 2104.09864, eq. 34); compiled, one pass forward and one backward.

B batch, T tokens, H heads, R rotary width (even), F = R/2 frequencies.
"""

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float

Table = tuple[Float[Tensor, "#B T 1 F"], Float[Tensor, "#B T 1 F"]]  # cos and sin


def apply_rotary(x: Float[Tensor, "B T H R"], table: Table, interleave: bool) -> Float[Tensor, "B T H R"]:
    """Rotate x by cos and sin; pairs are (0,1),(2,3)… when `interleave`, else
    (i, i+F).

    The result has the two-halves layout either way: only the product of queries and keys matters.
    """
    cos, sin = table
    B, T, _, R = x.shape
    fits = cos.shape == sin.shape and cos.shape[0] in (1, B) and cos.shape[1:] == (T, 1, R // 2)
    if fits and cpu.usable(x, cos, sin) and x.stride(0) == x.stride(1) * T:
        return _Rotate.apply(x, cos.contiguous(), sin.contiguous(), interleave)
    return apply_rotary_reference(x, table, interleave)


def apply_rotary_reference(x: Float[Tensor, "B T H R"], table: Table, interleave: bool) -> Float[Tensor, "B T H R"]:
    cos, sin = table
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _RotateContext(Context):
    interleave: bool


class _Rotate(Function):
    @staticmethod
    def forward(ctx: _RotateContext, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _rotate(x, cos, sin, _pairs(interleave, x), 1.0, _pairs(False, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: _RotateContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        return _rotate(grad, cos, sin, _pairs(False, grad), -1.0, _pairs(ctx.interleave, grad)), None, None, None


def _pairs(interleave: bool, x: Tensor) -> tuple[int, int]:
    """Strides from one pair to the next, and from a pair's first number to its second."""
    return (2, 1) if interleave else (1, x.shape[-1] // 2)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, pairs: tuple[int, int], sign: float, out_pairs: tuple[int, int]
) -> Tensor:
    B, T, H, R = x.shape
    out = x.new_empty(B, T, H, R)
    cpu.call(
        "apply_rotary", x.dtype, x, x.stride(1), x.stride(2), *pairs, cos, sin, cos.shape[0] * T, B * T, H, R // 2,
        sign, out, *out_pairs,
    )  # fmt: skip
    return out
