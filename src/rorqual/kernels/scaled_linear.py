"""Linears whose three products take numbers of small formats: output, input gradient and weight gradient (V3 §3.3).

M rows, K inputs, N outputs, E experts, F width of a feed-forward network. A factor has its tiles along the dimension
that is contracted: activations along K in the forward pass; gradients along N for the input gradient, and along M, as
activations too, for the weight gradient. Products accumulate in FP32 throughout. Hopper's tensor cores keep some 14
bits of a sum, so V3 promotes it to FP32 every 128 inputs (§3.3.2).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import gpu
from rorqual.kernels.block_scaled import BlockScaled, block_starts, block_starts_on_device, decode, quantize
from rorqual.kernels.deferred_gradients import now_or_later
from rorqual.kernels.number_formats import NumberFormat
from rorqual.kernels.quantize_swiglu import quantize_swiglu
from rorqual.kernels.swiglu import swiglu_joined_gradient
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float, Float32, Int32

Ends = Int32[Tensor, " E"] | None  # where each expert's rows end; None: there is one


@dataclass(frozen=True)
class LinearFormats:
    """The formats of a linear's factors. Those along columns; a transposed one has its tiles along rows."""

    activation: NumberFormat
    weight: NumberFormat
    weight_transposed: NumberFormat  # of the input gradient's product
    gradient: NumberFormat
    cached: NumberFormat  # of the activations kept for the backward pass


def scaled_linear(
    x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, formats: LinearFormats
) -> Float[Tensor, "*batch N"]:
    """x·weightᵀ + bias; the input is kept for the backward pass in `formats.cached`."""
    rows = x.reshape(-1, x.shape[-1])
    out = _ScaledLinear.apply(rows, weight, formats, torch.is_grad_enabled()).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def scaled_feed_forward(
    x: Float[Tensor, "M K"],
    gate: Float[Tensor, "*E gate K"],
    up: Float[Tensor, "F K"] | None,
    down: Float[Tensor, "*E K F"],
    ends: Ends,
    formats: LinearFormats,
    weights: Float32[Tensor, " M"] | None = None,
) -> Float[Tensor, "M K"]:
    """down(silu(gate(x)) · up(x) · weights), the weights by row; None: all are 1.

    One network, or with each row's expert: then `gate` [E, 2F, K] has the rows of up after its own, up is None, and x
    is sorted by expert, expert e's rows ending at ends[e].

    Kept for the backward pass are the input and gate and up, in `formats.cached`; their product is computed again (V3
    §3.3.3).
    """
    return _ScaledFeedForward.apply(x, gate, up, down, weights, ends, formats, torch.is_grad_enabled())


class _LinearContext(Context):
    formats: LinearFormats
    width: int
    weight: Tensor  # the parameter itself, for now_or_later


class _FeedForwardContext(Context):
    formats: LinearFormats
    width: int
    apart: bool  # whether gate and up are two weights
    weights: tuple[Tensor, Tensor | None, Tensor]  # gate, up and down, as they are


class _ScaledLinear(Function):
    @staticmethod
    def forward(ctx: _LinearContext, x: Tensor, weight: Tensor, formats: LinearFormats, keep: bool) -> Tensor:
        ctx.formats, ctx.width, ctx.weight = formats, x.shape[1], weight
        rounded, cached = _activations(x, formats, keep)
        if cached is not None:
            ctx.save_for_backward(*cached.kept, weight)
        return output_product(rounded, quantize_weight(weight, formats.weight), 1, None, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, weight = ctx.saved_tensors
        formats, width, needed = ctx.formats, ctx.width, ctx.needs_input_grad

        def gradient() -> tuple[Tensor]:
            x = decode(codes, scales, formats.cached, width)
            return (_weight_gradient(grad, quantize, x, formats, None, 1, weight.dtype)[0],)

        grad_x = _input_gradient(grad, weight, formats, None) if needed[0] else None
        return grad_x, *now_or_later(needed[1], (ctx.weight,), gradient), None, None


class _ScaledFeedForward(Function):
    @staticmethod
    def forward(
        ctx: _FeedForwardContext, x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, weights: Tensor | None,
        ends: Ends, formats: LinearFormats, keep: bool,
    ) -> Tensor:  # fmt: skip
        E = len(down) if up is None else 1
        ctx.formats, ctx.width, ctx.apart, ctx.weights = formats, x.shape[1], up is not None, (gate, up, down)
        rounded, cached = _activations(x, formats, keep)
        h = output_product(rounded, quantize_weight(_joined(gate, up), formats.weight, 2), E, ends, x.dtype)
        if cached is not None:
            inner = quantize(_halves(h), formats.cached)
            kept = (*cached.kept, *inner.kept, gate, up, down, weights, ends)
            ctx.save_for_backward(*kept)  # pyright: ignore[reportArgumentType]
        s = quantize_swiglu(h, formats.activation, weights=weights, codes=False, values=True)
        return output_product(s, quantize_weight(down, formats.weight), E, ends, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _FeedForwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, inner_codes, inner_scales, gate, up, down, weights, ends = ctx.saved_tensors
        formats, width, x_width, apart = ctx.formats, down.shape[-1], ctx.width, ctx.apart
        E, gate_up = (1, _joined(gate, up)) if apart else (len(down), gate)
        needed = ctx.needs_input_grad
        h = decode(inner_codes, inner_scales, formats.cached, width).view(-1, 2 * width).to(grad.dtype)

        def down_gradient() -> tuple[Tensor]:
            inner = functools.partial(quantize_swiglu, weights=weights)
            return (_weight_gradient(grad, inner, h, formats, ends, E, down.dtype).view_as(down),)

        def gate_up_gradient() -> tuple[Tensor, Tensor | None]:
            x = decode(codes, scales, formats.cached, x_width)
            found = _weight_gradient(grad_h, quantize, x, formats, ends, E, gate.dtype)
            return (found[0, : len(gate)], found[0, len(gate) :]) if apart else (found, None)

        (grad_down,) = now_or_later(needed[3], ctx.weights[2:], down_gradient)
        grad_h, grad_weights = swiglu_joined_gradient(_input_gradient(grad, down, formats, ends), h, weights)
        grad_x = _input_gradient(grad_h, gate_up, formats, ends, 2) if needed[0] else None
        grad_gate, grad_up = now_or_later(needed[1], ctx.weights[:2], gate_up_gradient)
        return grad_x, grad_gate, grad_up, grad_down, grad_weights, None, None, None


def _activations(x: Tensor, formats: LinearFormats, keep: bool) -> tuple[BlockScaled, BlockScaled | None]:
    """x for the product, and as it is kept for the backward pass."""
    same = formats.cached == formats.activation
    rounded = quantize(x, formats.activation, codes=keep and same, values=True)
    return rounded, (rounded if same else quantize(x, formats.cached)) if keep else None


def _input_gradient(grad: Tensor, weight: Tensor, formats: LinearFormats, ends: Ends, parts: int = 1) -> Tensor:
    rounded = quantize(grad.contiguous(), formats.gradient, codes=False, values=True)
    transposed = quantize_weight(weight, formats.weight_transposed, parts, by_columns=True)
    return input_gradient_product(rounded, transposed, len(weight) if weight.ndim == 3 else 1, ends, grad.dtype)


def _weight_gradient(
    grad: Tensor,
    quantize_x: Callable[..., BlockScaled],
    x: Tensor,
    formats: LinearFormats,
    ends: Ends,
    experts: int,
    dtype: torch.dtype,
) -> Tensor:
    gradient, activation = formats.gradient.transposed, formats.activation.transposed
    starts, height = None, gradient.tile[0]
    if experts > 1 and ends is not None and height:
        starts = block_starts_on_device(ends, height, len(x)) if ends.is_cuda else block_starts(ends, height)
    rounded_grad = quantize(grad.contiguous(), gradient, starts, codes=False, values=True)
    rounded_x = quantize_x(x, activation, starts, codes=False, values=True)
    return weight_gradient_product(rounded_grad, rounded_x, experts, ends, dtype)


def _joined(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate if up is None else torch.cat([gate, up])


def _halves(h: Tensor) -> Tensor:
    """[M, 2F] → [2M, F]: gate and up share no tile."""
    return h.view(-1, h.shape[1] // 2)


# -- rounded weights and the products


def quantize_weight(
    weight: Float[Tensor, "*E N K"], format: NumberFormat, parts: int = 1, by_columns: bool = False
) -> BlockScaled:
    """The weights [E·N, K] of stacked linears, `parts` to an expert; none of them shares a block with another."""
    rows, height = weight.flatten(0, -2), format.tile[0]
    each = weight.shape[-2] // parts
    if height <= 1 or each % height == 0 or len(rows) == each:
        return quantize(rows, format, codes=False, values=True, by_columns=by_columns)
    ends = torch.arange(each, len(rows) + 1, each, dtype=torch.int32)
    starts = block_starts(ends, height).to(weight.device)
    found = quantize(rows, format, starts, codes=False, values=True, by_columns=by_columns)
    return replace(found, every=each)


def output_product(
    x: BlockScaled, weight: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "M N"]:
    """x·weightᵀ with each row's expert, in `dtype`. On a GPU by the kernels that gpu.py names."""
    found = _on_gpu("output", x, weight, experts, ends, dtype)
    if found is not None:
        return found
    return _grouped(x.values, weight.values.view(experts, -1, weight.shape[1]).transpose(1, 2), ends).to(dtype)


def input_gradient_product(
    grad: BlockScaled, weight: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "M K"]:
    """grad·weight with each row's expert."""
    found = _on_gpu("input gradient", grad, weight, experts, ends, dtype)
    if found is not None:
        return found
    return _grouped(grad.values, weight.values.view(experts, -1, weight.shape[1]), ends).to(dtype)


def weight_gradient_product(
    grad: BlockScaled, x: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "E N K"]:
    """gradᵀ·x over each expert's rows."""
    found = _on_gpu("weight gradient", grad, x, experts, ends, dtype)
    if found is not None:
        return found
    left, right = grad.values.T, x.values
    if experts == 1 or ends is None:
        return (left @ right).unsqueeze(0).to(dtype)
    if left.stride(1) % 4 == 0 and right.stride(0) % 4 == 0:
        return F.grouped_mm(left, right, offs=ends).to(dtype)
    cuts = ends[:-1].long().cpu()
    parts = zip(left.tensor_split(cuts, 1), right.tensor_split(cuts), strict=True)
    return torch.stack([a @ b for a, b in parts]).to(dtype)


def _on_gpu(
    kind: gpu.Kind, left: BlockScaled, right: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype
) -> Tensor | None:
    """The product by a GPU kernel; None where there is none."""
    a, b = (gpu.Factor(x.format, x.shape, x.every) for x in (left, right))
    way = gpu.way(kind, a, b, experts, gpu.chip(left.scales.device))
    if way == "torch":
        out = gpu.scaled_mm(kind, left.kept, right.kept, right.format, dtype)
        return out.unsqueeze(0) if kind == "weight gradient" else out
    if way == "reference":
        return None
    from rorqual.kernels.triton import gemm

    if kind == "weight gradient":
        return gemm.weight_gradient(left, right, experts, ends, dtype)
    return gemm.rows_product(left, right, experts, ends, dtype, kind == "input gradient")


def _grouped(x: Tensor, weight: Tensor, ends: Ends) -> Tensor:
    """x [M, A] · weight [E, A, B] with each row's expert."""
    if len(weight) == 1 or ends is None:
        return x @ weight[0]
    if all(size % 4 == 0 for size in weight.shape[1:]):  # PyTorch's grouped product wants rows of 16 bytes
        return F.grouped_mm(x, weight, offs=ends)
    parts = x.tensor_split(ends[:-1].long().cpu())
    return torch.cat([part @ own for part, own in zip(parts, weight, strict=True)])
