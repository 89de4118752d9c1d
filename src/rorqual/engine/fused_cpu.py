"""The fused decode step on a CPU (kernels/fused_decode.py), built from a model with quantised weights."""

from typing import Any

from torch import Tensor

from rorqual.engine.paged_kv_cache import PagedKVCache
from rorqual.kernels import cpu
from rorqual.kernels.fused_decode import FusedDecodeStep, LayerWeights, ModelSizes, MTPJoin, Weights
from rorqual.kernels.huge_pages import use_huge_pages
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import ModelConfig, Transformer
from rorqual.model.attention import LATENT_NORM_EPS, MultiHeadLatentAttention
from rorqual.model.layers import Linear, SwiGLU
from rorqual.model.moe import MixtureOfExperts
from rorqual.model.rope import softmax_scale


def fused_decode_step(model: Transformer, cache: PagedKVCache) -> FusedDecodeStep | None:
    """The model's fused step; None where weights are not quantised or compiled kernels are missing."""
    step = _step(model, cache, slice(model.config.num_hidden_layers), model.model.norm.weight)
    if step is not None:
        use_huge_pages(v.data for m in model.modules() for v in vars(m).values() if isinstance(v, QuantizedWeight))
    return step


def fused_mtp_step(model: Transformer, cache: PagedKVCache) -> FusedDecodeStep | None:
    """The fused step of the first multi-token module, or None as above."""
    depth = model.config.num_hidden_layers
    module = model.model.layers[depth]
    join = MTPJoin(module.enorm.weight, module.hnorm.weight, _weights(module.eh_proj))
    return _step(model, cache, slice(depth, depth + 1), module.shared_head["norm"].weight, join)


def _step(
    model: Transformer, cache: PagedKVCache, which: slice, norm: Tensor, join: MTPJoin | None = None
) -> FusedDecodeStep | None:
    config = model.config
    if not isinstance(model.head_weight, QuantizedWeight) or cpu.capability() is None:
        return None
    layers = [
        LayerWeights(
            attn_norm=layer.input_layernorm.weight, ffn_norm=layer.post_attention_layernorm.weight, a=a, b=b,
            **_attention(layer.self_attn), **_feed_forward(layer.mlp),
        )
        for layer, (a, b) in zip(model.model.layers[which], cache.layers[which], strict=True)
    ]  # fmt: skip
    frequencies, factor = model.rope
    return FusedDecodeStep(
        layers, _sizes(config, cache.is_int8), model.model.embed_tokens.weight, norm, model.head_weight, frequencies,
        factor, softmax_scale(config), config.rms_norm_eps, LATENT_NORM_EPS, config.routed_scaling_factor, join,
    )  # fmt: skip


def _sizes(config: ModelConfig, int8_kv: bool) -> ModelSizes:
    latent, experts = {}, {}
    if config.is_mla:
        mla = config.mla
        latent = {"latent_dim": mla.kv_lora_rank, "nope_dim": mla.qk_nope_head_dim, "value_dim": mla.v_head_dim}
    if config.n_routed_experts:
        experts = {
            "experts": config.n_routed_experts,
            "top_k": config.num_experts_per_tok,
            "expert_groups": config.n_group,
            "groups_kept": config.topk_group,
            "softmax": config.scoring_func == "softmax",
            "correction_bias": config.topk_method == "noaux_tc",
            "group_limited": config.topk_method != "greedy" and config.topk_group != config.n_group,
            "normalise": config.norm_topk_prob,
        }
    return ModelSizes(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.gqa.num_key_value_heads,
        rope_dim=config.rope_dim,
        interleave=config.rope_interleave,
        int8_kv=int8_kv,
        **latent,
        **experts,
    )


def _attention(attention: Any) -> dict[str, Any]:
    if not isinstance(attention, MultiHeadLatentAttention):
        return {name: _weights(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v", "o")}
    found: dict[str, Any] = {
        "kv_a": _weights(attention.kv_a_proj_with_mqa),
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight,
        "o": _weights(attention.o_proj),
    }
    if hasattr(attention, "q_proj"):
        return found | {"q": _weights(attention.q_proj)}
    low = {
        "q_a": _weights(attention.q_a_proj),
        "q_a_norm": attention.q_a_layernorm.weight,
        "q": _weights(attention.q_b_proj),
    }
    return found | low


def _feed_forward(mlp: SwiGLU | MixtureOfExperts) -> dict[str, Weights | Tensor | None]:
    if isinstance(mlp, SwiGLU):
        return {name: _weights(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")}
    shared = _feed_forward(mlp.shared_experts) if hasattr(mlp, "shared_experts") else {}
    return shared | {
        "router": mlp.gate.weight.float(),
        "correction": mlp.gate.e_score_correction_bias.float() if mlp.gate.method == "noaux_tc" else None,
        "experts_in": (mlp.experts.gate_up_proj, None),
        "experts_out": (mlp.experts.down_proj, None),
    }


def _weights(linear: Linear) -> Weights:
    return linear.weight, linear.bias
