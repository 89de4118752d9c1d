"""Sorting tokens by expert and back, as gathers in both directions.

Autograd's own derivative of a gather is a scatter with additions, which is slow and, on a GPU, not deterministic;
since every token goes to exactly K places, its derivative is again a gather and a sum over K.
N tokens, K places each (place p belongs to token p // K), E experts, M rows: the N·K places sorted by expert,
each expert's rows filled up to a multiple where that is asked for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels import cpu


class Permutation(NamedTuple):
    place: Tensor  # [M] the place in each row; N·K in rows that only fill up
    row: Tensor  # [N·K] the row of each place
    ends: Tensor  # [E] int32: expert e's rows end at ends[e]
    load: Tensor  # [E] places of each expert


def sort_by_expert(chosen: Tensor, experts: int, multiple: int = 1) -> Permutation:
    """chosen [N, K]: the expert of every place → where it goes, each expert's rows filled up to `multiple`."""
    expert = chosen.flatten()
    load = expert.new_zeros(experts).scatter_add_(0, expert, torch.ones_like(expert))  # bincount waits for a GPU
    order = expert.argsort(stable=True)
    here = torch.arange(len(expert), device=expert.device)
    row = torch.empty_like(order)
    if multiple == 1:
        row[order] = here
        return Permutation(order, row, load.cumsum(0).to(torch.int32), load)
    room = (load + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    ends = room.cumsum(0)
    row[order] = here + (ends - room - load.cumsum(0) + load).repeat_interleave(load)
    place = torch.full((int(ends[-1]),), len(expert), device=expert.device)
    place[row] = here
    return Permutation(place, row, ends.to(torch.int32), load)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, row: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(row)
        ctx.k = k
        return x.index_select(0, _token(place, x, k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        if cpu.usable(grad):
            tokens, width = len(row) // ctx.k, grad.shape[1]
            grad_x = grad.new_empty(tokens, width)
            cpu.call("unpermute", grad.dtype, grad.contiguous(), None, row, tokens, ctx.k, width, grad_x)
            return grad_x, None, None, None
        return grad.index_select(0, row).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, place: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, place, row)
        if cpu.usable(y) and weights.dtype == torch.float32:
            out = y.new_empty(len(weights), y.shape[1])
            cpu.call("unpermute", y.dtype, y.contiguous(), weights.contiguous(), row, *weights.shape, y.shape[1], out)
            return out
        rows = y.index_select(0, row).view(*weights.shape, -1)  # [N, K, D]
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), rows).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, place, row = ctx.saved_tensors
        if cpu.usable(grad, y) and weights.dtype == torch.float32:
            grad_y, grad_weights = y.new_empty(y.shape), weights.new_empty(weights.shape)
            sizes = (len(place), *weights.shape, y.shape[1])
            tensors = (grad.contiguous(), y.contiguous(), weights.contiguous(), place)
            cpu.call("unpermute_backward", y.dtype, *tensors, *sizes, grad_y, grad_weights)
            return grad_y, grad_weights, None, None
        grad_rows = grad.index_select(0, _token(place, grad, weights.shape[1]))  # [M, D]
        grad_weights = (grad_rows * y).sum(-1, dtype=torch.float32).index_select(0, row).view_as(weights)
        filled = torch.cat([weights.flatten().to(y.dtype), y.new_zeros(1)])  # rows that fill up get no gradient
        grad_rows.mul_(filled.index_select(0, place).unsqueeze(1))
        return grad_rows, grad_weights.to(weights.dtype), None, None


def _token(place: Tensor, x: Tensor, k: int) -> Tensor:
    """Whose places these are; rows that fill up hold some token or other."""
    return place.div(k, rounding_mode="floor").clamp_(max=len(x) - 1)


def permute(x: Tensor, arrangement: Permutation, k: int) -> Tensor:
    """x [N, D] → [M, D]: every row the token of its place."""
    return _Dispatch.apply(x, arrangement.place, arrangement.row, k)


def unpermute(y: Tensor, weights: Tensor, arrangement: Permutation) -> Tensor:
    """y [M, D] and weights [N, K] → [N, D], the weighted sum of each token's K rows."""
    return _Combine.apply(y, weights, arrangement.place, arrangement.row)


def permute_reference(x: Tensor, arrangement: Permutation, k: int) -> Tensor:
    filler = arrangement.place == len(x) * k
    return x[(arrangement.place // k).where(~filler, len(x) - 1)]


def unpermute_reference(y: Tensor, weights: Tensor, arrangement: Permutation) -> Tensor:
    kept = (arrangement.place < weights.numel()).nonzero()[:, 0]
    place = arrangement.place[kept]
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    scaled = y[kept] * weights.flatten()[place].to(y.dtype).unsqueeze(1)
    return out.index_add(0, place // weights.shape[1], scaled)
