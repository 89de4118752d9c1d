"""Sorting tokens by expert and back, as gathers in both directions.

Autograd's own derivative of a gather is a scatter with additions, which is slow and, on a GPU, not deterministic;
since every token goes to exactly K places, its derivative is again a gather and a sum over K.
N tokens, K places each, M = N·K rows.
"""

from typing import Any

import torch
from torch import Tensor


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order.div(k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(order)).unflatten(0, (-1, ctx.k)).sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        inverse = _inverse(order)
        ctx.save_for_backward(y, weights, order, inverse)
        rows = y.index_select(0, inverse).view(*weights.shape, -1)  # [N, K, D]
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), rows).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, order, inverse = ctx.saved_tensors
        token = order.div(weights.shape[1], rounding_mode="floor")
        grad_rows = grad.index_select(0, token)  # [M, D] in expert order
        grad_weights = (grad_rows * y).sum(-1, dtype=torch.float32).index_select(0, inverse).view_as(weights)
        grad_rows.mul_(weights.flatten().index_select(0, order).to(y.dtype).unsqueeze(1))
        return grad_rows, grad_weights.to(weights.dtype), None


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def dispatch(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [N, D] → [M, D]: row i is the token of place order[i] (place p belongs to token p // k)."""
    return _Dispatch.apply(x, order, k)


def combine(y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """y [M, D] in expert order and weights [N, K] → [N, D], the weighted sum of each token's K rows."""
    return _Combine.apply(y, weights, order)


def dispatch_reference(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x[order // k]


def combine_reference(y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    scaled = y * weights.flatten()[order].to(y.dtype).unsqueeze(1)
    return out.index_add(0, order // weights.shape[1], scaled)
