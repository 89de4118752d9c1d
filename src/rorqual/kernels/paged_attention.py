"""Paged attention of one new token of each sequence over the KV cache; forward only.

n sequences, H heads, G key/value heads (H is a multiple), W their width; C latent, R rotary width. The KV cache has
blocks of P slots (16 or a larger power of two): row i attends to the first lengths[i] slots of the blocks tables[i],
both int32. Keys, values and latents may be FP8 (kv_fp8.py), as uint8; rope keys are BF16 then. Raises ValueError for
other shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu, kv_fp8
from rorqual.shapes import Float, Int32, UInt8


def grouped_attention(
    q: Float[Tensor, "n H W"],
    k: Float[Tensor, "blocks P G W"] | UInt8[Tensor, "blocks P G row"],
    v: Float[Tensor, "blocks P G W"] | UInt8[Tensor, "blocks P G row"],
    tables: Int32[Tensor, "n _"],
    lengths: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "n H W"]:
    _check(q, k, tables, lengths)
    none = q.new_empty(0)
    if k.dtype is torch.uint8 and _usable(q):
        return _call_fp8(q, none, k, none, v, k.shape[2], tables, lengths, scale)
    if not _usable(q, k, v):
        return grouped_attention_reference(q, k, v, tables, lengths, scale)
    keys = (*k.stride()[:3], none, 0, 0)
    return _call(q, none, k, keys, v, v.stride()[:3], k.shape[2], tables, lengths, scale)


def grouped_attention_reference(
    q: Float[Tensor, "n H W"],
    k: Float[Tensor, "blocks P G W"] | UInt8[Tensor, "blocks P G row"],
    v: Float[Tensor, "blocks P G W"] | UInt8[Tensor, "blocks P G row"],
    tables: Int32[Tensor, "n _"],
    lengths: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "n H W"]:
    """The heads of a group are stacked as query positions, so its keys are read once."""
    n, H, W = q.shape
    mask = _mask(k, tables, lengths)
    k, v = _gather(k, tables, mask, q), _gather(v, tables, mask, q)
    heads = q.view(n, k.shape[2], -1, W)
    out = F.scaled_dot_product_attention(
        heads, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None], scale=scale
    )
    return out.reshape(n, H, -1)


def latent_attention(
    q_latent: Float[Tensor, "n H C"],
    q_rope: Float[Tensor, "n H R"],
    latent: Float[Tensor, "blocks P C"] | UInt8[Tensor, "blocks P row"],
    k_rope: Float[Tensor, "blocks P R"],
    tables: Int32[Tensor, "n _"],
    lengths: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "n H C"]:
    """softmax((q_latent·latentᵀ + q_rope·k_ropeᵀ)·scale)·latent (V2 §2.1.2). Latents are read twice; plain products
    read them four times.
    """
    _check(q_latent, latent, tables, lengths)
    if latent.dtype is torch.uint8 and _usable(q_latent, q_rope):
        return _call_fp8(q_latent, q_rope, latent, k_rope, latent, 1, tables, lengths, scale)
    if not _usable(q_latent, q_rope, latent, k_rope):
        return latent_attention_reference(q_latent, q_rope, latent, k_rope, tables, lengths, scale)
    block, slot = latent.stride()[:2]
    keys = (block, slot, 0, k_rope, *k_rope.stride()[:2])
    return _call(q_latent, q_rope, latent, keys, latent, (block, slot, 0), 1, tables, lengths, scale)


def latent_attention_reference(
    q_latent: Float[Tensor, "n H C"],
    q_rope: Float[Tensor, "n H R"],
    latent: Float[Tensor, "blocks P C"] | UInt8[Tensor, "blocks P row"],
    k_rope: Float[Tensor, "blocks P R"],
    tables: Int32[Tensor, "n _"],
    lengths: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "n H C"]:
    mask = _mask(latent, tables, lengths)
    latent, k_rope = _gather(latent, tables, mask, q_latent), _gather(k_rope, tables, mask, q_rope)
    scores = torch.bmm(q_latent, latent.transpose(1, 2))
    scores = torch.baddbmm(scores, q_rope, k_rope.transpose(1, 2))
    scores = scores.float().mul_(scale).masked_fill_(~mask.unsqueeze(1), float("-inf"))
    return torch.bmm(scores.softmax(-1).to(latent.dtype), latent)


def _gather(store: Tensor, tables: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """[blocks, P, …] → [n, S, …] of the queries' dtype, S the slots of a whole table.

    Slots that a row does not attend to are 0: a NaN that another sequence left there would pass through a weight of 0.
    """
    found = store[tables.long()].flatten(1, 2)
    if found.dtype is torch.uint8:
        found = kv_fp8.dequantize(found, like.shape[-1])
    return found.to(like.dtype).masked_fill(~mask.view(*mask.shape, *[1] * (found.ndim - 2)), 0.0)


def _mask(store: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    slots = torch.arange(tables.shape[1] * store.shape[1], device=lengths.device)
    return slots < lengths.unsqueeze(1)


def _check(q: Tensor, store: Tensor, tables: Tensor, lengths: Tensor) -> None:
    n, P = len(q), store.shape[1]
    if P & (P - 1) or P < 16 or tables.shape[0] != n or lengths.shape != (n,):
        raise ValueError(f"{n} rows, blocks of {P} slots, tables {list(tables.shape)}, lengths {list(lengths.shape)}")


def _usable(q: Tensor, *others: Tensor) -> bool:
    return not torch.is_grad_enabled() and cpu.usable(q, *others)


def _call(
    q: Tensor,
    q2: Tensor,
    k: Tensor,
    keys: tuple[int | Tensor, ...],
    v: Tensor,
    values: tuple[int, ...],
    groups: int,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """keys, values: strides of blocks, slots and heads; keys also have the second part and its strides."""
    n, H, W = q.shape
    P = k.shape[1]
    out = q.new_empty(n, H, v.shape[-1])
    width2 = q2.shape[-1]
    cpu.call(
        "paged_attention", q.dtype, q.contiguous(), q2.contiguous(), k, *keys, v, *values, tables, tables.stride(0), P,
        lengths, n, H, groups, W, width2, v.shape[-1], scale, out,
    )  # fmt: skip
    return out


def _call_fp8(
    q: Tensor, q2: Tensor, k: Tensor, k2: Tensor, v: Tensor, groups: int, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    n, H, W = q.shape
    out = q.new_empty(n, H, W)
    cpu.call(
        "paged_attention_fp8", q.dtype, q.contiguous(), q2.contiguous(), k, k2.view(torch.uint8), v,
        tables.contiguous(), tables.shape[1], k.shape[1], lengths, n, H, groups, W, q2.shape[-1], scale, out,
    )  # fmt: skip
    return out
