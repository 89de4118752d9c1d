"""Products in which every element is one chain of fused multiply-adds over k in ascending order, from the bias on.

M rows, K in, N out, E experts, H heads.
"""

from functools import partial

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.exact.arithmetic import fma, usable
from rorqual.kernels.exact.autograd import exact
from rorqual.kernels.linear import grouped_linear_reference
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float32, Int32


def exact_linear(
    x: Float32[Tensor, "*batch K"], weight: Float32[Tensor, "N K"], bias: Float32[Tensor, " N"] | None = None
) -> Float32[Tensor, "*batch N"]:
    """x·weightᵀ + bias."""
    return _ExactLinear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def exact_grouped_linear(
    x: Float32[Tensor, "M K"], weight: Float32[Tensor, "E N K"], ends: Int32[Tensor, " E"]
) -> Float32[Tensor, "M N"]:
    """x·weightᵀ with each row's expert; expert e's rows end at ends[e]."""
    return exact(partial(grouped_product, ends=ends), partial(grouped_linear_reference, ends=ends), x, weight)


def exact_head_linear(
    x: Float32[Tensor, "*batch H K"], weight: Float32[Tensor, "H N K"]
) -> Float32[Tensor, "*batch H N"]:
    """x·weightᵀ with each head's own weight."""
    return exact(head_product, partial(torch.einsum, "...hk,hnk->...hn"), x, weight)


def product(
    x: Float32[Tensor, "*batch K"],
    weight: Float32[Tensor, "N K"],
    bias: Float32[Tensor, " N"] | None = None,
    out: Float32[Tensor, "*batch N"] | None = None,
) -> Float32[Tensor, "*batch N"]:
    """`exact_linear` without a gradient; into `out`, if there is one, whose rows are contiguous."""
    if out is None:
        out = x.new_empty(*x.shape[:-1], len(weight))
    if not usable(x, weight):
        return out.copy_(product_reference(x, weight, bias))
    x, stride = cpu.rows(x)
    _call(x, stride, 0, weight.unsqueeze(0), bias, None, out.numel() // max(1, len(weight)), out, len(weight), 0)
    return out


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`exact_grouped_linear` without a gradient."""
    if not usable(x, weight):
        return grouped_product_reference(x, weight, ends)
    x, stride = cpu.rows(x)
    N = weight.shape[1]
    out = x.new_empty(len(x), N)
    _call(x, stride, 0, weight, None, ends, len(x), out, N, 0)
    return out


def head_product(x: Tensor, weight: Tensor) -> Tensor:
    """`exact_head_linear` without a gradient."""
    if not usable(x, weight):
        return head_product_reference(x, weight)
    x = x.contiguous()
    (H, N, K), rows = weight.shape, x.shape[:-2].numel()
    out = x.new_empty(*x.shape[:-1], N)
    _call(x, H * K, K, weight, None, None, rows, out, H * N, N)
    return out


def product_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], len(weight))
    out = out if bias is None else out + bias
    for k in range(x.shape[-1]):
        out = fma(x[..., k, None], weight[:, k], out)
    return out


def grouped_product_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    parts = x.tensor_split(ends[:-1].long())
    return torch.cat([product_reference(part, own) for part, own in zip(parts, weight, strict=True)])


def head_product_reference(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([product_reference(x[..., h, :], own) for h, own in enumerate(weight)], dim=-2)


class _ExactLinear(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, rows = ctx.needs_input_grad, grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ weight).view(x.shape) if needed[0] else None
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1]) if needed[1] else None
        return grad_x, grad_weight, rows.sum(0) if needed[2] else None


def _call(
    x: Tensor, stride: int, group: int, weight: Tensor, bias: Tensor | None, ends: Tensor | None, rows: int,
    out: Tensor, out_stride: int, out_group: int,
) -> None:  # fmt: skip
    """weight [groups, N, K], or a view of [groups, K, N]; the strides are those of rows and groups."""
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    groups, N, K = weight.shape
    stored = weight if weight.stride(2) == 1 else weight.transpose(1, 2)
    cpu.call(
        "exact_gemm", x.dtype, x, stride, group, stored, *weight.stride(), bias, ends, rows, groups, N, K, out,
        out_stride, out_group,
    )  # fmt: skip
