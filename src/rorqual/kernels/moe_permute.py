"""Permute tokens by expert and back, as gathers in both directions.

Autograd's gradient of a gather is a scatter-add, which is slow and, on a GPU, not deterministic; since every token has
exactly K slots, its gradient is again a gather and a sum over K.
N tokens, K slots each (slot s belongs to token s // K), E experts, M rows: the N·K slots sorted by expert, each
expert's rows padded to a multiple on request. A slot whose expert is -1 has no row: expert parallelism sends tokens to
ranks and nodes by the same functions, and a token does not go to all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float, Int, Int32


class Permutation(NamedTuple):
    slot: Int[Tensor, " M"]  # of each row; N·K in padding rows
    row: Int[Tensor, " N*K"]  # of each slot; -1: none
    ends: Int32[Tensor, " E"]  # expert e's rows end at ends[e]
    load: Int[Tensor, " E"]  # slots of each expert


def sort_by_expert(
    chosen: Int[Tensor, "N K"], experts: int, multiple: int = 1, *, partial: bool = False
) -> Permutation:
    """chosen: the expert of every slot → its permutation, each expert's rows padded to `multiple`.

    `partial`: experts may be -1.
    """
    expert = chosen.flatten()
    if partial:
        return _sort_present(expert, experts, multiple)
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


def _sort_present(expert: Tensor, experts: int, multiple: int) -> Permutation:
    """Of the slots that have an expert."""
    present = (expert >= 0).nonzero()[:, 0]
    found = sort_by_expert(expert[present].unsqueeze(1), experts, multiple)
    row = torch.full_like(expert, -1).index_copy_(0, present, found.row)
    slot = torch.cat([present, present.new_full((1,), len(expert))])[found.slot]
    return Permutation(slot, row, found.ends, found.load)


class _Context(Context):
    k: int


class _Permute(Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, slot: Tensor, row: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(row)
        ctx.k = k
        return x.index_select(0, _token(slot, x, k))

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        return sum_of_rows(grad, row, ctx.k), None, None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: _Context, y: Tensor, slot: Tensor, row: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.k = k
        return sum_of_rows(y, row, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, _token(slot, grad, ctx.k)), None, None, None


def sum_of_rows(y: Float[Tensor, "M D"], row: Int[Tensor, " slots"], k: int) -> Float[Tensor, "N D"]:
    """The sum of each token's rows, without a gradient."""
    if cpu.usable(y):
        out = y.new_empty(len(row) // k, y.shape[1])
        cpu.call("unpermute", y.dtype, y.contiguous(), row, *out.shape[:1], k, y.shape[1], out)
        return out
    padded = torch.cat([y, y.new_zeros(1, y.shape[1])])  # -1: the last row
    return torch.unflatten(padded.index_select(0, row.where(row >= 0, len(y))), 0, (-1, k)).sum(1)


def _token(slot: Tensor, x: Tensor, k: int) -> Tensor:
    """The token of each slot; padding rows hold any token."""
    return slot.div(k, rounding_mode="floor").clamp_(max=len(x) - 1)


def permute(x: Float[Tensor, "N D"], permutation: Permutation, k: int) -> Float[Tensor, "M D"]:
    """Each row has the token of its slot."""
    return _Permute.apply(x, permutation.slot, permutation.row, k)


def permute_weights(weights: Float[Tensor, "N K"], permutation: Permutation) -> Float[Tensor, " M"]:
    """Each row has the weight of its slot; padding rows have 0."""
    return torch.cat([weights.flatten(), weights.new_zeros(1)]).index_select(0, permutation.slot)


def unpermute(y: Float[Tensor, "M D"], permutation: Permutation, k: int) -> Float[Tensor, "N D"]:
    """The sum of each token's K rows. Padding rows get some token's gradient: what made them has weight 0."""
    return _Unpermute.apply(y, permutation.slot, permutation.row, k)


def permute_reference(x: Float[Tensor, "N D"], permutation: Permutation, k: int) -> Float[Tensor, "M D"]:
    filler = permutation.slot == len(x) * k
    return x[(permutation.slot // k).where(~filler, len(x) - 1)]


def unpermute_reference(y: Float[Tensor, "M D"], permutation: Permutation, k: int) -> Float[Tensor, "N D"]:
    kept = (permutation.slot < len(permutation.row)).nonzero()[:, 0]
    out = torch.zeros(len(permutation.row) // k, y.shape[1], dtype=y.dtype, device=y.device)
    return out.index_add(0, permutation.slot[kept] // k, y[kept])
