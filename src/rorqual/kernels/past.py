"""Attention of one new token over a sequence's past, without derivative.

B sequences, S tokens of past, H heads, G key/value heads (H is a multiple), W their width; C latent, R rotary width.
mask is bool [B or 1, 1, 1, S], true where seen; None sees all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [B, 1, H, W], k and v [B, S, G, W] → [B, 1, H, W]."""
    if not _usable(q, k, v):
        return grouped_attention_reference(q, k, v, mask, scale)
    none = q.new_empty(0)
    return _call(q, none, k, (k.stride(2), k.shape[2]), none, (0, 0), v, v.stride(2), mask, scale)


def grouped_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The heads of a group stand in for query positions, so its keys are read once."""
    B, _, H, width = q.shape
    heads = q.view(B, k.shape[2], -1, width)
    out = F.scaled_dot_product_attention(heads, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(B, 1, H, -1)


def latent_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax((q_latent·latentᵀ + q_rope·k_ropeᵀ)·scale)·latent: q_latent [B, 1, H, C], q_rope [B, 1, H, R], latent
    [B, S, C], k_rope [B, S, R] → [B, 1, H, C]. Latents are read twice, where plain products make four passes.
    """
    if not _usable(q_latent, q_rope, latent, k_rope):
        return latent_attention_reference(q_latent, q_rope, latent, k_rope, mask, scale)
    rope = (k_rope.stride(0), k_rope.stride(1))
    return _call(q_latent, q_rope, latent, (0, 1), k_rope, rope, latent, 0, mask, scale)


def latent_attention_reference(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Also of several new tokens: T in the place of 1, and mask [B or 1, 1, T, S]."""
    B, T, H, C = q_latent.shape
    scores = torch.bmm(q_latent.reshape(B, T * H, C), latent.transpose(1, 2))
    scores = torch.baddbmm(scores, q_rope.reshape(B, T * H, -1), k_rope.transpose(1, 2))
    scores = scores.float().mul_(scale).view(B, T, H, -1)
    if mask is not None:
        scores = scores.masked_fill_(~mask.transpose(1, 2), float("-inf"))
    weights = scores.softmax(-1).to(latent.dtype).view(B, T * H, -1)
    return torch.bmm(weights, latent).view(B, T, H, C)


def _usable(q: Tensor, *others: Tensor) -> bool:
    return q.shape[1] == 1 and not torch.is_grad_enabled() and cpu.usable(q, *others)


def _call(
    q: Tensor,
    q2: Tensor,
    k: Tensor,
    k_groups: tuple[int, int],
    k2: Tensor,
    k2_strides: tuple[int, int],
    v: Tensor,
    v_group: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """k_groups: distance between key heads, and how many there are."""
    B, _, H, width = q.shape
    places = k.shape[1]
    if mask is None:
        mask = torch.ones(1, places, dtype=torch.bool, device=q.device)
    mask = mask.view(-1, places)
    out = q.new_empty(B, 1, H, v.shape[-1])
    cpu.call(
        "past_attention", q.dtype, q.contiguous(), q2.contiguous(), k, k.stride(0), k.stride(1), k_groups[0],
        k2, *k2_strides, v, v.stride(0), v.stride(1), v_group, mask, mask.stride(0) if len(mask) > 1 else 0,
        B, H, k_groups[1], places, width, q2.shape[-1], v.shape[-1], scale, out,
    )  # fmt: skip
    return out
