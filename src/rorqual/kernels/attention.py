"""softmax(q·kᵀ·scale)·v. B batch, H heads, T queries, S keys, D query width, V value width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512  # keys up to which the weights of all heads may be held: T·S·H·B numbers


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
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()  # each product would copy them otherwise
        weights = (q @ k.transpose(2, 3)).masked_fill_(~mask, torch.finfo(q.dtype).min).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        slope = torch.ops.aten._softmax_backward_data(grad @ v.transpose(2, 3), weights, -1, weights.dtype)
        grad_q = (slope @ k).mul_(ctx.scale)
        return grad_q, slope.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad, None, None
