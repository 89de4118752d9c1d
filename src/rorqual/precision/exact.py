"""The exact mode: a built model whose forward pass gives each token the same bits, whatever is computed beside it.

The classes below swap the model's functions for those of kernels/exact/, in FP32 on a CPU. Batches, packed prompts,
chunks of a prompt, prefix-cache hits and preemption then change no bit of a hidden state, a router's choice or a
log-probability, so an engine and a trainer that share the model agree on all of them. Latent attention has one form for
training, prefill and decode, the absorbed one.
"""

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.dense_attention import Mask
from rorqual.kernels.exact.attention import exact_attention, exact_paged_attention
from rorqual.kernels.exact.linear import exact_grouped_linear, exact_head_linear, exact_linear
from rorqual.kernels.exact.rows import (
    exact_rms_norm,
    exact_rotary,
    exact_rotary_table,
    exact_sigmoid,
    exact_softmax,
    exact_swiglu,
    exact_swiglu_joined,
)
from rorqual.kernels.rotary import Table
from rorqual.model import Transformer
from rorqual.model.attention import GroupedQueryAttention, MultiHeadLatentAttention, UpProjection
from rorqual.model.kv_cache import CacheView, DecodeView
from rorqual.model.layers import Linear, RMSNorm, SwiGLU
from rorqual.model.moe import Experts, Router
from rorqual.shapes import Float32, Int32, Int64


class ExactLinear(Linear):
    def forward(self, input: Float32[Tensor, "*batch K"]) -> Float32[Tensor, "*batch N"]:
        return exact_linear(input, self.weight, self.bias)


class ExactRMSNorm(RMSNorm):
    def forward(self, x: Float32[Tensor, "*batch D"]) -> Float32[Tensor, "*batch D"]:
        return exact_rms_norm(x, self.weight, self.eps)


class ExactSwiGLU(SwiGLU):
    def forward(self, x: Float32[Tensor, "*batch D"]) -> Float32[Tensor, "*batch D"]:
        return self.down_proj(exact_swiglu(self.gate_proj(x), self.up_proj(x)))


class ExactExperts(Experts):
    def forward(
        self, x: Float32[Tensor, "M D"], weights: Float32[Tensor, " M"], ends: Int32[Tensor, " E"]
    ) -> Float32[Tensor, "M D"]:
        h = exact_grouped_linear(x, self.gate_up_proj, ends)
        return exact_grouped_linear(exact_swiglu_joined(h, weights), self.down_proj, ends)


class ExactRouter(Router):
    def scores(self, x: Float32[Tensor, "N D"]) -> Float32[Tensor, "N E"]:
        return (exact_sigmoid if self.scoring == "sigmoid" else exact_softmax)(exact_linear(x, self.weight))

    def gate_weights(self, scores: Float32[Tensor, "N E"], chosen: Int64[Tensor, "N K"]) -> Float32[Tensor, "N K"]:
        weights = scores.gather(1, chosen)
        if self.normalise:
            total = weights[:, :1]
            for slot in range(1, self.K):  # in one order
                total = total + weights[:, slot : slot + 1]
            weights = weights / (total + 1e-20)
        return weights * self.factor


class ExactGroupedQueryAttention(GroupedQueryAttention):
    def rotate(self, x: Float32[Tensor, "B T heads W"], table: Table) -> Float32[Tensor, "B T heads W"]:
        return exact_rotary(x, table, self.interleave)

    def attend_cached(self, q: Float32[Tensor, "1 T H W"], view: CacheView) -> Float32[Tensor, "1 T H W"]:
        if not isinstance(view, DecodeView):
            return self.expanded(q, view.a, view.b, None)
        none = view.a.new_empty(*view.a.shape[:2], 0)
        out = exact_paged_attention(q[0], view.a, none, view.b, view.tables, view.lengths, self.scale)
        return out.unsqueeze(0)

    def expanded(
        self,
        q: Float32[Tensor, "B T H W"],
        k: Float32[Tensor, "B S G W"],
        v: Float32[Tensor, "B S G W"],
        mask: Mask,
    ) -> Float32[Tensor, "B T H W"]:
        return exact_attention(q, k, k.new_empty(*k.shape[:2], 0), v, mask, self.scale)


class ExactLatentAttention(MultiHeadLatentAttention):
    def rotate(self, x: Float32[Tensor, "B T heads R"], table: Table) -> Float32[Tensor, "B T heads R"]:
        return exact_rotary(x, table, self.interleave)

    def expanded(
        self,
        q_nope: Float32[Tensor, "B T H N"],
        q_rope: Float32[Tensor, "B T H R"],
        latent: Float32[Tensor, "B S C"],
        k_rope: Float32[Tensor, "B S R"],
        mask: Mask,
    ) -> Float32[Tensor, "B T H V"]:
        """The absorbed form, of packed sequences: the latents are keys and values that all heads share."""
        latent = latent.unsqueeze(2)
        return self._out(exact_attention(self._queries(q_nope, q_rope), latent, k_rope, latent, mask, self.scale))

    def absorbed(
        self, q_nope: Float32[Tensor, "n H N"], q_rope: Float32[Tensor, "n H R"], view: DecodeView
    ) -> Float32[Tensor, "n H V"]:
        q, latent = self._queries(q_nope, q_rope), view.a.unsqueeze(2)
        return self._out(exact_paged_attention(q, latent, view.b, latent, view.tables, view.lengths, self.scale))

    def _queries(self, q_nope: Tensor, q_rope: Tensor) -> Float32[Tensor, "*batch H wide"]:
        w_k = self._up_projections()[:, : self.N]
        return torch.cat([exact_head_linear(q_nope, w_k.transpose(1, 2)), q_rope], dim=-1)

    def _out(self, o_latent: Float32[Tensor, "*batch H C"]) -> Float32[Tensor, "*batch H V"]:
        return exact_head_linear(o_latent, self._up_projections()[:, self.N :])

    def _up_projections(self) -> Float32[Tensor, "H NV C"]:
        return self.kv_b_proj.weight.view(self.H, self.N + self.V, self.C)


class ExactTransformer(Transformer):
    def head(self, hidden: Float32[Tensor, "*batch D"]) -> Float32[Tensor, "*batch V"]:
        return exact_linear(hidden, self.head_weight)

    def _rope_table(self, tokens: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Table:
        if positions is None:
            positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        frequencies, factor = self.rope
        return exact_rotary_table((positions[..., None].float() * frequencies).unsqueeze(2), factor)


# The first that fits counts; the absorbed form reads an up-projection's weight.
SWAPS: dict[type[nn.Module], type[nn.Module] | None] = {
    Transformer: ExactTransformer,
    GroupedQueryAttention: ExactGroupedQueryAttention,
    MultiHeadLatentAttention: ExactLatentAttention,
    Experts: ExactExperts,
    Router: ExactRouter,
    SwiGLU: ExactSwiGLU,
    RMSNorm: ExactRMSNorm,
    UpProjection: None,
    Linear: ExactLinear,
}


def make_exact(model: Transformer) -> None:
    """Give `model` the exact mode, in place; its parameters stay the same objects with the same names.

    Raises UserError for a model on a GPU or with parameters in other than FP32.
    """
    for name, p in model.named_parameters():
        if p.dtype is not torch.float32 or not p.is_cpu:
            found = str(p.dtype).removeprefix("torch.") if p.is_cpu else "on a GPU"
            raise UserError(f'exact: {name} is {found}; set model.dtype = "float32" and device = "cpu"')
    for module in model.modules():
        exact = next((new for old, new in SWAPS.items() if type(module) is old), None)
        if exact is not None:
            object.__setattr__(module, "__class__", exact)
