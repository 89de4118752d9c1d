"""Matrix products: linear layers, and grouped products of experts with the rows routed to them.

M rows, K in, N out, E experts; `ends` int32 [E]: the rows of expert e end at ends[e].
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.fp8_weight import FP8Weight, dense, dequantize
from rorqual.kernels.quantized_linear import QuantizedWeight, quantized_linear
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.processor import allows
from rorqual.shapes import Float, Float32, Int32

MAX_COMPILED_ROWS = 256  # beyond, oneDNN is faster, which packs the weights at each call


def linear(
    x: Float[Tensor, "*batch K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight | FP8Weight,
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "*batch N"]:
    """x·weightᵀ + bias; an FP8 weight is dequantised to x's dtype."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    weight = dense(weight, x.dtype)
    fits = bias is None or (bias.shape == weight.shape[:1] and cpu.usable(x, bias))
    if torch.is_grad_enabled() or not fits or not _usable(x, weight) or (rows := x[..., 0].numel()) > MAX_COMPILED_ROWS:
        return linear_reference(x, weight, bias)
    ends = torch.tensor([rows], dtype=torch.int32)
    out = _product(x.reshape(rows, x.shape[-1]), weight.unsqueeze(0), bias, ends)
    return out.view(*x.shape[:-1], len(weight))


def shapes_are_free(weight: Tensor | QuantizedWeight, rows: int) -> bool:
    """Whether a product of a new shape costs no extra time. oneDNN compiles a kernel for every shape in BF16, which
    takes longer than the product.
    """
    if isinstance(weight, QuantizedWeight):
        return True
    compiles = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return not compiles or (rows <= MAX_COMPILED_ROWS and cpu.has_dot_products())


def linear_reference(
    x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "*batch N"]:
    return F.linear(x, weight, bias)


def fp32_linear(x: Float[Tensor, "N K"], weight: Float[Tensor, "M K"]) -> Float32[Tensor, "N M"]:
    """x·weightᵀ computed in FP32, of which x and weight are kept for the backward pass as they are: a BF16 x takes half
    of what its copy takes.
    """
    return _FP32Linear.apply(x, weight)


class _FP32Linear(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, (grad.T @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None


def grouped_linear(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "E N K"] | QuantizedWeight | FP8Weight, ends: Int32[Tensor, " E"]
) -> Float[Tensor, "M N"]:
    """x·weightᵀ with each row's expert; x is sorted by expert."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, ends=ends)
    if isinstance(weight, FP8Weight):
        return _expert_by_expert(x, weight, ends)
    if not _grouped_usable(x, weight) or ends.shape != weight.shape[:1] or x.ndim != 2:
        return grouped_linear_reference(x, weight, ends)
    return _Grouped.apply(x, weight, ends)


def grouped_linear_reference(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "E N K"], ends: Int32[Tensor, " E"]
) -> Float[Tensor, "M N"]:
    fits = ends.shape == weight.shape[:1]
    if fits and any(size * weight.element_size() % 16 for size in weight.shape[1:]):  # not supported by PyTorch's
        rows = x.tensor_split(ends[:-1].long().cpu())
        return torch.cat([part @ own.T for part, own in zip(rows, weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _expert_by_expert(x: Tensor, weight: FP8Weight, ends: Tensor) -> Tensor:
    """One dequantised expert in memory at a time, of those that have rows."""
    out = x.new_empty(len(x), weight.codes.shape[1])
    first = 0
    for expert, last in enumerate(map(int, ends.cpu().numpy())):
        if last > first:
            out[first:last] = linear(x[first:last], dequantize(weight, expert).to(x.dtype))
        first = last
    return out


def row_multiple(x: Tensor, weight: Tensor | QuantizedWeight | FP8Weight, mean_load: int) -> int:
    """Multiple to pad an expert's rows to, where oneDNN multiplies (see shapes_are_free): padding made experts
    2.2 times as fast at 512 rows each. Small loads have few shapes anyway.
    """
    if isinstance(weight, QuantizedWeight):
        return 1
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and mean_load >= 128
    return 32 if slow and (isinstance(weight, FP8Weight) or not _grouped_usable(x, weight)) else 1


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight, None, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        E, N, K = weight.shape
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = x.new_empty(x.shape)
            cpu.call("grouped_gemm_backward_input", x.dtype, grad, N, weight, ends, E, N, K, grad_x)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            pairs = x.new_empty(len(x) // 2 + E + 1, -(-N // 12) * 12, dtype=torch.float32)
            cpu.call(
                "grouped_gemm_backward_weight", x.dtype, grad, N, x, x.stride(0), ends, E, N, K, pairs, grad_weight
            )
        return grad_x, grad_weight, None


def _usable(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled products (csrc/bf16_gemm.cpp) take these; they read weights once, without packing."""
    return (
        x.dtype == torch.bfloat16
        and cpu.usable(x, weight)
        and weight.is_contiguous()
        and x.shape[-1] == weight.shape[-1]
        and weight.shape[-1] % 2 == 0
        and cpu.has_dot_products()
    )


def _grouped_usable(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled grouped products and gradients are used; with AMX, oneDNN's, which use it, are faster."""
    return _usable(x, weight) and weight.shape[-2] % 2 == 0 and not (_has_amx() and allows("amx"))


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_tile"))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    E, N, K = weight.shape
    out = x.new_empty(len(x), N)
    cpu.call("grouped_gemm", x.dtype, x, x.stride(0), weight, bias, ends, E, N, K, out)
    return out
