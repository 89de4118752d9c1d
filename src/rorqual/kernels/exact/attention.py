"""softmax(q·kᵀ·scale)·v, one query at a time over the keys that it sees, in their order; others are skipped.

So packed sequences, chunks of a prompt and a paged KV cache give the same bits. B batch, T queries, S keys, H heads, G
key/value heads (H is a multiple), V the width of values; a key has W numbers of its head, and R that heads share (those
with rotary embedding of latent attention).
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from rorqual.kernels import cpu
from rorqual.kernels.dense_attention import Mask, attention
from rorqual.kernels.exact.arithmetic import CHAINS, chains_sum, dot_chains, exp, fma, total, usable
from rorqual.kernels.exact.autograd import exact
from rorqual.shapes import Bool, Float32, Int32


def exact_attention(
    q: Float32[Tensor, "B T H wide"],
    k: Float32[Tensor, "B S G W"],
    shared: Float32[Tensor, "B S R"],
    v: Float32[Tensor, "B S G V"],
    mask: Mask,
    scale: float,
) -> Float32[Tensor, "B T H V"]:
    """q [B, T, H, W + R]. Masks are those of kernels/dense_attention.py; None: the T queries are the last of the S
    positions, causal.
    """

    def ordinary(q: Tensor, k: Tensor, shared: Tensor, v: Tensor) -> Tensor:
        G, V = v.shape[2:]
        k = torch.cat([k, shared.unsqueeze(2).expand(-1, -1, G, -1)], dim=-1)
        width = max(q.shape[-1], V)  # torch's fused kernel needs equal ones
        q, k, v = (pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
        T, S = q.shape[2], k.shape[2]
        seen = _causal(T, S)[None, None] if mask is None else mask
        return attention(q, k, v, seen, False, scale).transpose(1, 2)[..., :V]

    return exact(partial(_dense, mask=mask, scale=scale), ordinary, q, k, shared, v)


def exact_paged_attention(
    q: Float32[Tensor, "n H wide"],
    k: Float32[Tensor, "blocks P G W"],
    shared: Float32[Tensor, "blocks P R"],
    v: Float32[Tensor, "blocks P G V"],
    tables: Int32[Tensor, "n _"],
    lengths: Int32[Tensor, " n"],
    scale: float,
) -> Float32[Tensor, "n H V"]:
    """One query of each of n sequences: row i attends to the first lengths[i] slots of the blocks tables[i]."""
    P = k.shape[1]
    k, shared, v = k.flatten(0, 1), shared.flatten(0, 1), v.flatten(0, 1)
    if usable(q, k, v):
        paged = (tables.contiguous(), tables.shape[1], P, lengths, None, 0, 0, 1, 0)
        return _call(q, k, shared, v, paged, scale)
    found = torch.empty(*q.shape[:2], v.shape[-1])
    for i in range(len(lengths)):
        at = torch.arange(int(lengths[i]))
        found[i] = _attend(q[i], k, shared, v, tables[i, at // P].long() * P + at % P, scale)
    return found


def _dense(q: Tensor, k: Tensor, shared: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    (B, T, H, _), S = q.shape, k.shape[1]
    q, k, shared, v = (x.flatten(0, 1) for x in (q, k, shared, v))
    if not isinstance(mask, tuple):
        own = None if mask is None else mask.squeeze(1)
        return _packed(q, k, shared, v, own, T, S, scale).view(B, T, H, -1)
    parts: list[Tensor] = []
    first = 0
    for seen in mask:  # they cover the row in turn
        t = seen.shape[-1]
        here = slice(first, first + len(seen) * t)
        first = here.stop
        parts.append(_packed(q[here], k[here], shared[here], v[here], seen.squeeze(1), t, t, scale))
    return torch.cat(parts).view(B, T, H, -1)


def _packed(
    q: Float32[Tensor, "n H wide"], k: Float32[Tensor, "m G W"], shared: Float32[Tensor, "m R"],
    v: Float32[Tensor, "m G V"], mask: Bool[Tensor, "masks one_or_t one_or_S"] | None, tokens: int, keys: int,
    scale: float,
) -> Float32[Tensor, "n H V"]:  # fmt: skip
    """Sequences of `tokens` queries and `keys` keys each, one after the other."""
    if mask is not None:
        mask = mask.expand(-1, tokens, keys)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    if usable(q, k, v):
        by_sequence, by_token = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))
        return _call(q, k, shared, v, (None, 0, 1, None, mask, by_sequence, by_token, tokens, keys), scale)
    seen = _causal(tokens, keys)[None] if mask is None else mask
    found = torch.empty(*q.shape[:2], v.shape[-1])
    for i in range(len(q)):
        sequence, token = divmod(i, tokens)
        slots = seen[sequence % len(seen), token].nonzero()[:, 0] + sequence * keys
        found[i] = _attend(q[i], k, shared, v, slots, scale)
    return found


def _causal(T: int, S: int) -> Bool[Tensor, "T S"]:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def _call(
    q: Tensor, k: Tensor, shared: Tensor, v: Tensor, keys: tuple[Tensor | int | None, ...], scale: float
) -> Tensor:
    """keys: block tables, their distance, slots of a block, lengths; mask, its distances; tokens and keys."""
    n, H, _ = q.shape
    k, shared, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, shared, v))
    (_, G, W), V, R = k.shape, v.shape[-1], shared.shape[-1]
    out = q.new_empty(n, H, V)
    cpu.call(
        "exact_attention", q.dtype, q.contiguous(), k, *k.stride()[:2], W, shared if R else None, shared.stride(0), R,
        v, *v.stride()[:2], V, *keys, n, H, G, scale, out,
    )  # fmt: skip
    return out


def _attend(q: Tensor, k: Tensor, shared: Tensor, v: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Reference: one query [H, W + R] over the keys in `slots`."""
    share = q.shape[0] // k.shape[1]
    if not len(slots):
        return q.new_zeros(q.shape[0], v.shape[-1])
    keys, values = (x[slots].transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))  # [H, keys, …]
    W = k.shape[-1]
    chains = dot_chains(q[:, None, :W], keys, q.new_zeros(*keys.shape[:2], CHAINS))
    if shared.shape[-1]:
        chains = dot_chains(q[:, None, W:], shared[slots].unsqueeze(0), chains)
    scores = chains_sum(chains) * scale
    weights = exp(scores - scores.amax(-1, keepdim=True))
    out = q.new_zeros(q.shape[0], v.shape[-1])
    for j in range(len(slots)):
        out = fma(weights[:, j, None], values[:, j], out)
    return out / total(weights).unsqueeze(1)
