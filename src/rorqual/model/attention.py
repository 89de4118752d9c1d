"""Attention: multi-head latent (V2 §2.1, V3 §2.1.1) and grouped-query.

Shapes: B batch, T new tokens, S tokens attended to, H heads, G key/value heads, D hidden; C latent (kv_lora_rank),
N / R query-key width without / with rotary embedding, V value width. A mask is true where a query attends, or one for
each of several packed sequences (kernels/dense_attention.py); None is causal. With a KV cache the
new tokens of all sequences are concatenated, B = 1, and its views say what each attends to (kv_cache.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels.dense_attention import Mask, attention
from rorqual.kernels.fp8_weight import dense
from rorqual.kernels.paged_attention import grouped_attention, latent_attention
from rorqual.kernels.rotary import Table, apply_rotary
from rorqual.model.config import ModelConfig
from rorqual.model.kv_cache import CacheView, DecodeView, KVCache
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.rope import softmax_scale
from rorqual.shapes import Float

LATENT_NORM_EPS = 1e-6  # as in the release, which ignores rms_norm_eps here


def attend(
    q: Float[Tensor, "B T H W"], k: Float[Tensor, "B S G W"], v: Float[Tensor, "B S G V"], mask: Mask, scale: float
) -> Float[Tensor, "B T H V"]:
    """softmax(q·kᵀ·scale)·v.

    Without a mask the T queries are the last of the S positions.
    """
    width = v.shape[-1]
    if width < q.shape[-1]:  # torch's fused CPU kernel needs equal widths; zero columns change nothing
        v = F.pad(v, (0, q.shape[-1] - width))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    T, S = q.shape[2], k.shape[2]
    causal = mask is None and T > 1
    if causal and S > T:
        mask, causal = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T), False
    out = attention(q, k, v, mask, causal, scale)
    return out.transpose(1, 2)[..., :width]


def concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class UpProjection(Linear):
    """From latents to keys and values; the absorbed form multiplies with its matrix directly."""

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "N K"]:
        return dense(self.weight, dtype)


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads are projected from one latent [C] a token; the KV cache holds it and the rotated
    key [R] (V2 §2.1.2).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.interleave = layer, config.rope_interleave
        mla = config.mla
        self.H, self.C = config.num_attention_heads, mla.kv_lora_rank
        self.N, self.R, self.V = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.scale = softmax_scale(config)
        hidden, bias, queries = config.hidden_size, config.attention_bias, self.H * (self.N + self.R)
        if mla.q_lora_rank:
            self.q_a_proj = Linear(hidden, mla.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, queries, bias=False)
        else:
            self.q_proj = Linear(hidden, queries, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.C + self.R, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.C, LATENT_NORM_EPS)
        self.kv_b_proj = UpProjection(self.C, self.H * (self.N + self.V), bias=False)
        self.o_proj = Linear(self.H * self.V, hidden, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], table: Table, mask: Mask = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_a_proj(x)
        return self.o_proj(self.heads(q, self.kv_a_proj_with_mqa(x), table, mask, cache).flatten(2))

    def heads(
        self,
        q: Float[Tensor, "B T queries"],
        latent: Float[Tensor, "B T latent"],
        table: Table,
        mask: Mask,
        cache: KVCache | None,
    ) -> Float[Tensor, "B T H V"]:
        """From queries, or their latents, and the latents of keys and values to the output of every head."""
        if hasattr(self, "q_b_proj"):
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = torch.unflatten(q, -1, (self.H, self.N + self.R))
        q_nope, q_rope = torch.split(q, [self.N, self.R], dim=-1)
        q_rope = self.rotate(q_rope, table)
        latent, k_rope = torch.split(latent, [self.C, self.R], dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = self.rotate(k_rope.unsqueeze(2), table).squeeze(2)
        if cache is None:
            return self.expanded(q_nope, q_rope, latent, k_rope, mask)
        views = cache.append(self.layer, latent, k_rope)
        return concatenate([self.attend_cached(q_nope[:, p.tokens], q_rope[:, p.tokens], p) for p in views])

    def rotate(self, x: Float[Tensor, "B T heads R"], table: Table) -> Float[Tensor, "B T heads R"]:
        return apply_rotary(x, table, self.interleave)

    def attend_cached(
        self, q_nope: Float[Tensor, "1 T H N"], q_rope: Float[Tensor, "1 T H R"], view: CacheView
    ) -> Float[Tensor, "1 T H V"]:
        if isinstance(view, DecodeView):
            return self.absorbed(q_nope[0], q_rope[0], view).unsqueeze(0)
        return self.expanded(q_nope, q_rope, view.a, view.b, None)

    def expanded(
        self,
        q_nope: Float[Tensor, "B T H N"],
        q_rope: Float[Tensor, "B T H R"],
        latent: Float[Tensor, "B S C"],
        k_rope: Float[Tensor, "B S R"],
        mask: Mask,
    ) -> Float[Tensor, "B T H V"]:
        """Training and prefill: keys and values of every head are computed (V2 eq. 9–19)."""
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.H, self.N + self.V)).split((self.N, self.V), dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.H, -1)
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        return attend(q, k, v, mask, self.scale)

    def absorbed(
        self, q_nope: Float[Tensor, "n H N"], q_rope: Float[Tensor, "n H R"], view: DecodeView
    ) -> Float[Tensor, "n H V"]:
        """Decode: the up-projections are absorbed into query and output (V2 §2.1.2), so attention reads latents only.

        One token of each of n sequences.
        """
        w_kv = self.kv_b_proj.matrix(q_nope.dtype).view(self.H, self.N + self.V, self.C)
        w_k, w_v = torch.split(w_kv, [self.N, self.V], dim=1)
        q_latent = torch.einsum("nhd,hdc->nhc", q_nope, w_k)
        o_latent = latent_attention(q_latent, q_rope, view.a, view.b, view.tables, view.lengths, self.scale)
        return torch.einsum("nhc,hvc->nhv", o_latent, w_v)


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (Ainslie et al. 2023); qwen2 has biases on q, k, v."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.interleave = layer, config.rope_interleave
        self.H, self.G, self.W = config.num_attention_heads, config.gqa.num_key_value_heads, config.gqa.head_dim
        self.scale = softmax_scale(config)
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, self.H * self.W, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.G * self.W, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.G * self.W, bias=bias)
        self.o_proj = Linear(self.H * self.W, config.hidden_size, bias=bias and config.model_type == "llama")

    def forward(
        self, x: Float[Tensor, "B T D"], table: Table, mask: Mask = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        q = self.rotate(self.q_proj(x).unflatten(-1, (self.H, self.W)), table)
        k = self.rotate(self.k_proj(x).unflatten(-1, (self.G, self.W)), table)
        v = self.v_proj(x).unflatten(-1, (self.G, self.W))
        if cache is None:
            heads = self.expanded(q, k, v, mask)
        else:
            views = cache.append(self.layer, k, v)
            heads = concatenate([self.attend_cached(q[:, p.tokens], p) for p in views])
        return self.o_proj(heads.reshape(*x.shape[:2], self.H * self.W))

    def rotate(self, x: Float[Tensor, "B T heads W"], table: Table) -> Float[Tensor, "B T heads W"]:
        return apply_rotary(x, table, self.interleave)

    def attend_cached(self, q: Float[Tensor, "1 T H W"], view: CacheView) -> Float[Tensor, "1 T H W"]:
        if isinstance(view, DecodeView):
            return grouped_attention(q[0], view.a, view.b, view.tables, view.lengths, self.scale).unsqueeze(0)
        return self.expanded(q, view.a, view.b, None)

    def expanded(
        self, q: Float[Tensor, "B T H W"], k: Float[Tensor, "B S G W"], v: Float[Tensor, "B S G W"], mask: Mask
    ) -> Float[Tensor, "B T H W"]:
        """Training and prefill."""
        return attend(q, k, v, mask, self.scale)
