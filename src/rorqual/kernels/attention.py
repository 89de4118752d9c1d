"""softmax(q·kᵀ·scale)·v. B batch, H heads, T queries, S keys, D query width, V value width."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512  # keys up to which plain products are faster than torch's fused kernel
CHUNK_BYTES = 2 << 20  # of weights at a time, so that they stay in the processor's cache


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, V] → [B, H, T, V]; mask bool [B or 1, 1, T, S], true where seen.

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
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class _Products(torch.autograd.Function):
    """A few sequences at a time; their weights are made again for the derivative, which is faster than fetching them
    from memory. SmolLM2's attention over 19 rows of 256 tokens took X times as long with all weights at once.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        hidden = ~mask
        out = _rows_of_heads(v, q.shape[2])
        for part in _parts(q, k):
            weights, _ = _weights(q[part], k[part], _of(hidden, part), scale)
            out[part] = weights @ v[part].contiguous()
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden = ctx.saved_tensors
        grad_q, grad_k, grad_v = (_rows_of_heads(x, x.shape[2]) for x in (q, k, v))
        for part in _parts(q, k):
            weights, scaled = _weights(q[part], k[part], _of(hidden, part), ctx.scale)
            slope = grad[part].contiguous()
            grad_v[part] = weights.transpose(2, 3) @ slope
            slope = slope @ v[part].contiguous().transpose(2, 3)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_q[part] = (slope @ k[part].contiguous()).mul_(ctx.scale)
            grad_k[part] = slope.transpose(2, 3) @ scaled
        return grad_q, grad_k, grad_v, None, None


def _weights(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale) and q·scale; contiguous, since each product would copy its factors otherwise."""
    scaled = torch.mul(q, scale, out=torch.empty(q.shape, dtype=q.dtype))
    scores = scaled @ k.contiguous().transpose(2, 3)
    return scores.masked_fill_(hidden, torch.finfo(q.dtype).min).softmax(-1), scaled


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the batch."""
    size = max(1, CHUNK_BYTES // (q.shape[1] * q.shape[2] * k.shape[2] * q.itemsize))
    return (slice(start, start + size) for start in range(0, len(q), size))


def _of(mask: Tensor, part: slice) -> Tensor:
    return mask[part] if mask.ndim == 4 and len(mask) > 1 else mask


def _rows_of_heads(x: Tensor, tokens: int) -> Tensor:
    """Room for [B, H, tokens, width of x], laid out as the model has it: the heads of a token side by side."""
    B, H, _, width = x.shape
    return torch.empty(B, tokens, H, width, dtype=x.dtype).transpose(1, 2)
