"""Matrix products: linear layers, and grouped products of experts with the rows routed to them.

M rows, K in, N out, E experts; `ends` int32 [E]: the rows of expert e end at ends[e].
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.deferred_gradients import is_deferrable, now_or_later
from rorqual.kernels.fp8_weight import FP8Weight, dense, dequantize
from rorqual.kernels.quantized_linear import QuantizedWeight, quantized_linear
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.processor import allows
from rorqual.shapes import Float, Float32, Int32

MAX_COMPILED_ROWS = 256  # beyond, oneDNN is faster, which packs the weights at each call
MAX_FP32_ROWS = 48  # beyond, packing pays in FP32 too


def linear(
    x: Float[Tensor, "*batch K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight | FP8Weight,
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "*batch N"]:
    """x·weightᵀ + bias; an FP8 weight is dequantised to x's dtype."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    weight = dense(weight, x.dtype)
    if is_deferrable() and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    fits = bias is None or (bias.shape == weight.shape[:1] and cpu.usable(x, bias))
    if torch.is_grad_enabled() or not fits:
        return linear_reference(x, weight, bias)
    rows = x[..., 0].numel()
    if rows > MAX_COMPILED_ROWS or not (_usable_in_fp32(x, weight) or _usable(x, weight)):
        return linear_reference(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    if x.dtype == torch.float32 and rows > MAX_FP32_ROWS:
        out = _packed_product(flat, weight, bias)
    else:
        out = _product(flat, weight.unsqueeze(0), bias, torch.tensor([rows], dtype=torch.int32))
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


class _WeightContext(Context):
    weight: Tensor  # the parameter itself, for now_or_later


class _LinearContext(_WeightContext):
    bias: Tensor | None


class _Linear(Function):
    """`linear_reference` whose weight gradient can be deferred: the products of torch's own backward pass."""

    @staticmethod
    def forward(ctx: _LinearContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias = weight, bias
        return linear_reference(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, rows = ctx.needs_input_grad, grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ weight).view(x.shape) if needed[0] else None
        grad_weight = now_or_later(needed[1], (ctx.weight,), lambda: (rows.T @ x.reshape(-1, x.shape[-1]),))
        grad_bias = now_or_later(needed[2], (ctx.bias,), lambda: (rows.sum(0),))
        return grad_x, *grad_weight, *grad_bias


def fp32_linear(x: Float[Tensor, "N K"], weight: Float[Tensor, "M K"]) -> Float32[Tensor, "N M"]:
    """x·weightᵀ computed in FP32, of which x and weight are kept for the backward pass as they are: a BF16 x takes half
    of what its copy takes.
    """
    return _FP32Linear.apply(x, weight)


class _FP32Linear(Function):
    @staticmethod
    def forward(ctx: _WeightContext, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x.float() @ weight.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: _WeightContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, dtype = ctx.needs_input_grad, weight.dtype
        grad_x = (grad @ weight.float()).to(x.dtype) if needed[0] else None
        return grad_x, *now_or_later(needed[1], (ctx.weight,), lambda: ((grad.T @ x.float()).to(dtype),))


def grouped_linear(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "E N K"] | QuantizedWeight | FP8Weight, ends: Int32[Tensor, " E"]
) -> Float[Tensor, "M N"]:
    """x·weightᵀ with each row's expert; x is sorted by expert."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, ends=ends)
    if isinstance(weight, FP8Weight):
        return _expert_by_expert(x, weight, ends)
    if ends.shape != weight.shape[:1] or x.ndim != 2:
        return grouped_linear_reference(x, weight, ends)
    if not torch.is_grad_enabled() and _usable_in_fp32(x, weight) and len(x) <= MAX_FP32_ROWS * len(ends):
        return _product(x, weight, None, ends)
    if not _grouped_usable(x, weight):
        later = is_deferrable() and torch.is_grad_enabled()
        return (_GroupedReference.apply if later else grouped_linear_reference)(x, weight, ends)
    return _Grouped.apply(x, weight, ends)


def grouped_linear_reference(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "E N K"], ends: Int32[Tensor, " E"]
) -> Float[Tensor, "M N"]:
    if ends.shape == weight.shape[:1] and _one_by_one(weight):
        rows = x.tensor_split(ends[:-1].long().cpu())
        return torch.cat([part @ own.T for part, own in zip(rows, weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _one_by_one(weight: Tensor) -> bool:
    """Whether PyTorch's grouped product does not support rows of these sizes."""
    return any(size * weight.element_size() % 16 for size in weight.shape[1:])


class _GroupedReference(Function):
    """`grouped_linear_reference` whose weight gradient can be deferred."""

    @staticmethod
    def forward(ctx: _WeightContext, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.weight = weight
        return grouped_linear_reference(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: _WeightContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        needed = ctx.needs_input_grad

        def gradient() -> tuple[Tensor]:
            if not _one_by_one(weight):
                return (F.grouped_mm(grad.T, x, offs=ends),)
            cuts = ends[:-1].long().cpu()
            pairs = zip(grad.tensor_split(cuts), x.tensor_split(cuts), strict=True)
            return (torch.stack([rows.T @ part for rows, part in pairs]),)

        grad_x = grouped_linear_reference(grad, weight.transpose(1, 2), ends) if needed[0] else None
        return grad_x, *now_or_later(needed[1], (ctx.weight,), gradient), None


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
    def forward(ctx: _WeightContext, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.weight = weight
        return _product(x, weight, None, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: _WeightContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        E, N, K = weight.shape
        grad, needed = grad.contiguous(), ctx.needs_input_grad
        grad_x = None
        if needed[0]:
            grad_x = x.new_empty(x.shape)
            cpu.call("grouped_gemm_backward_input", x.dtype, grad, N, weight, ends, E, N, K, grad_x)

        def gradient() -> tuple[Tensor]:
            found = torch.empty_like(weight)
            pairs = x.new_empty(len(x) // 2 + E + 1, -(-N // 12) * 12, dtype=torch.float32)
            cpu.call("grouped_gemm_backward_weight", x.dtype, grad, N, x, x.stride(0), ends, E, N, K, pairs, found)
            return (found,)

        return grad_x, *now_or_later(needed[1], (ctx.weight,), gradient), None


def _usable_in_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled products take these. With AVX-512 and without AVX2 they were not compared with PyTorch's."""
    return x.dtype == torch.float32 and _fits(x, weight) and cpu.capability() == "avx2"


def _usable(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled products (csrc/bf16_gemm.cpp) take these; they read weights once, without packing."""
    return x.dtype == torch.bfloat16 and _fits(x, weight) and weight.shape[-1] % 2 == 0 and cpu.has_dot_products()


def _fits(x: Tensor, weight: Tensor) -> bool:
    return cpu.usable(x, weight) and weight.is_contiguous() and x.shape[-1] == weight.shape[-1]


def _grouped_usable(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled grouped products and gradients are used; with AMX, oneDNN's, which use it, are faster."""
    return _usable(x, weight) and weight.shape[-2] % 2 == 0 and not (_has_amx() and allows("amx"))


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_tile"))


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For more rows: csrc/exact_gemm.cpp packs a few columns at a time."""
    (N, K), out = weight.shape, x.new_empty(len(x), len(weight))
    cpu.call(
        "exact_gemm", x.dtype, x, x.stride(0), 0, weight, 0, K, 1, bias, None, len(x), 1, N, K, out, N, 0
    )  # fmt: skip
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    E, N, K = weight.shape
    out = x.new_empty(len(x), N)
    cpu.call("grouped_gemm", x.dtype, x, x.stride(0), weight, bias, ends, E, N, K, out)
    return out
