"""Permute tokens by expert and back, as gathers in both directions.

Autograd's gradient of a gather is a scatter-add, which is slow and, on a GPU, not deterministic; since every token has
exactly K slots, its gradient is again a gather and a sum over K.
N tokens, K slots each (slot s belongs to token s // K), E experts, M rows: the N·K slots sorted by expert, each
expert's rows padded to a multiple on request.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float, Int, Int32


class Permutation(NamedTuple):
    slot: Int[Tensor, " M"]  # of each row; N·K in padding rows
    row: Int[Tensor, " N*K"]  # of each slot
    ends: Int32[Tensor, " E"]  # expert e's rows end at ends[e]
    load: Int[Tensor, " E"]  # slots of each expert


def sort_by_expert(chosen: Int[Tensor, "N K"], experts: int, multiple: int = 1) -> Permutation:
    """chosen: the expert of every slot → its permutation, each expert's rows padded to `multiple`."""
    expert = chosen.flatten()
    load = expert.new_zeros(experts).scatter_add_(0, expert, torch.ones_like(expert))  # bincount would synchronise
    order = expert.argsort(stable=True)
    here = torch.arange(len(expert), device=expert.device)
    row = torch.empty_like(order)
    if multiple == 1:
        row[order] = here
        return Permutation(order, row, load.cumsum(0).to(torch.int32), load)
    padded = (load + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    ends = padded.cumsum(0)
    row[order] = here + (ends - padded - load.cumsum(0) + load).repeat_interleave(load)
    slot = torch.full((int(ends[-1]),), len(expert), device=expert.device)
    slot[row] = here
    return Permutation(slot, row, ends.to(torch.int32), load)


class _DispatchContext(Context):
    k: int


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: _DispatchContext, x: Tensor, slot: Tensor, row: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(row)
        ctx.k = k
        return x.index_select(0, _token(slot, x, k))

    @staticmethod
    @once_differentiable
    def backward(ctx: _DispatchContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        if cpu.usable(grad):
            tokens, width = len(row) // ctx.k, grad.shape[1]
            grad_x = grad.new_empty(tokens, width)
            cpu.call("unpermute", grad.dtype, grad.contiguous(), None, row, tokens, ctx.k, width, grad_x)
            return grad_x, None, None, None
        return torch.unflatten(grad.index_select(0, row), 0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Context, y: Tensor, weights: Tensor, slot: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, slot, row)
        if cpu.usable(y) and weights.dtype == torch.float32:
            out = y.new_empty(len(weights), y.shape[1])
            cpu.call("unpermute", y.dtype, y.contiguous(), weights.contiguous(), row, *weights.shape, y.shape[1], out)
            return out
        rows = y.index_select(0, row).view(*weights.shape, -1)  # [N, K, D]
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), rows).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, slot, row = ctx.saved_tensors
        if cpu.usable(grad, y) and weights.dtype == torch.float32:
            grad_y, grad_weights = y.new_empty(y.shape), weights.new_empty(weights.shape)
            sizes = (len(slot), *weights.shape, y.shape[1])
            tensors = (grad.contiguous(), y.contiguous(), weights.contiguous(), slot)
            cpu.call("unpermute_backward", y.dtype, *tensors, *sizes, grad_y, grad_weights)
            return grad_y, grad_weights, None, None
        grad_rows = grad.index_select(0, _token(slot, grad, weights.shape[1]))  # [M, D]
        grad_weights = (grad_rows * y).sum(-1, dtype=torch.float32).index_select(0, row).view_as(weights)
        filled = torch.cat([weights.flatten().to(y.dtype), y.new_zeros(1)])  # padding rows get no gradient
        grad_rows.mul_(filled.index_select(0, slot).unsqueeze(1))
        return grad_rows, grad_weights.to(weights.dtype), None, None


def _token(slot: Tensor, x: Tensor, k: int) -> Tensor:
    """The token of each slot; padding rows hold any token."""
    return slot.div(k, rounding_mode="floor").clamp_(max=len(x) - 1)


def permute(x: Float[Tensor, "N D"], permutation: Permutation, k: int) -> Float[Tensor, "M D"]:
    """Each row has the token of its slot."""
    return _Dispatch.apply(x, permutation.slot, permutation.row, k)


def unpermute(y: Float[Tensor, "M D"], weights: Float[Tensor, "N K"], permutation: Permutation) -> Float[Tensor, "N D"]:
    """The weighted sum of each token's K rows."""
    return _Combine.apply(y, weights, permutation.slot, permutation.row)


def permute_reference(x: Float[Tensor, "N D"], permutation: Permutation, k: int) -> Float[Tensor, "M D"]:
    filler = permutation.slot == len(x) * k
    return x[(permutation.slot // k).where(~filler, len(x) - 1)]


def unpermute_reference(
    y: Float[Tensor, "M D"], weights: Float[Tensor, "N K"], permutation: Permutation
) -> Float[Tensor, "N D"]:
    kept = (permutation.slot < weights.numel()).nonzero()[:, 0]
    slot = permutation.slot[kept]
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    scaled = y[kept] * weights.flatten()[slot].to(y.dtype).unsqueeze(1)
    return out.index_add(0, slot // weights.shape[1], scaled)
