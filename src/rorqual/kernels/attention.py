"""softmax(q·kᵀ·scale)·v. B batch, H heads, G key/value heads (H is a multiple), T queries, S keys, D, V widths."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 512  # keys up to which plain products are faster than torch's fused kernel
CHUNK_BYTES = 2 << 20  # of weights at a time, so that they stay in the processor's cache


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, G, S, D], v [B, G, S, V] → [B, H, T, V]; mask bool [B or 1, 1, T, S], true where seen.

    In BF16 on a CPU torch's fused kernel is slower than plain products (at T = 256 by 1.3 times forward and 2 with
    the derivative), so short sequences that are trained take those.
    """
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= LONGEST
    if short and torch.is_grad_enabled() and (mask is not None or causal):
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return _Products.apply(q, k, v, mask, scale)
    return attention_reference(q, k, v, mask, causal, scale)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class _Products(torch.autograd.Function):
    """A few sequences at a time; their weights are made again for the derivative instead of being held, B·H·T·S numbers
    a layer: 22 MB for SmolLM2 over 19 rows of 256 tokens, where it took half as long as torch's fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        hidden = ~mask
        out = _heads_side_by_side(v, *q.shape[:3], v.shape[3])
        for part in _parts(q, k):
            weights, _ = _weights(q[part], k[part], _of(hidden, part), scale)
            out[part] = (weights @ v[part].contiguous()).view(q[part].shape[:3] + v.shape[3:])
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden = ctx.saved_tensors
        grad_q, grad_k, grad_v = (_heads_side_by_side(x, *x.shape) for x in (q, k, v))
        for part in _parts(q, k):
            weights, scaled = _weights(q[part], k[part], _of(hidden, part), ctx.scale)
            slope = grad[part].contiguous().view(*scaled.shape[:3], -1)
            grad_v[part] = weights.transpose(2, 3) @ slope
            slope = slope @ v[part].contiguous().transpose(2, 3)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_q[part] = (slope @ k[part].contiguous()).mul_(ctx.scale).view(q[part].shape)
            grad_k[part] = slope.transpose(2, 3) @ scaled
        return grad_q, grad_k, grad_v, None, None


def _weights(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale) [B, G, H/G·T, S] and q·scale [B, G, H/G·T, D]: the heads that share keys are more queries.

    Everything is contiguous, since each product would copy its factors otherwise.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    scaled = torch.mul(q, scale, out=q.new_empty(q.shape)).view(B, G, H // G * T, D)
    scores = scaled @ k.contiguous().transpose(2, 3)
    scores.view(B, H, T, S).masked_fill_(hidden, torch.finfo(q.dtype).min)
    return scores.softmax(-1), scaled


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the batch."""
    size = max(1, CHUNK_BYTES // (q.shape[1] * q.shape[2] * k.shape[2] * q.itemsize))
    if torch.compiler.is_compiling():  # which would write every turn of the loop out
        size = len(q)
    return (slice(start, start + size) for start in range(0, len(q), size))


def _of(mask: Tensor, part: slice) -> Tensor:
    return mask[part] if mask.ndim == 4 and len(mask) > 1 else mask


def _heads_side_by_side(like: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Room for [B, H, T, W], laid out as the model has it: the heads of a token next to one another."""
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
