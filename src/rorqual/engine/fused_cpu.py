"""The fused decode step on a CPU (kernels/fused_decode.py), built from a model with quantised weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.engine.paged_kv_cache import PagedKVCache
from rorqual.kernels import cpu
from rorqual.kernels.fused_decode import FusedDecodeStep, LayerWeights, ModelSizes, MTPJoin, Weights
from rorqual.kernels.huge_pages import use_huge_pages
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import ModelConfig, Transformer
from rorqual.model.attention import LATENT_NORM_EPS, MultiHeadLatentAttention
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.moe import MixtureOfExperts
from rorqual.model.rope import softmax_scale
from rorqual.model.transformer import Block
from rorqual.parallel.experts import shares_experts


def fused_decode_step(model: Transformer, cache: PagedKVCache) -> FusedDecodeStep | None:
    """The model's fused step; None where weights are not quantised, other processes hold some of them, or compiled
    kernels are missing.
    """
    if not _can_fuse(model):
        return None
    stores = cache.layers[: model.config.num_hidden_layers]
    step = _step(model, model.layers, stores, cache.dtype, model.model.norm.weight)
    use_huge_pages(v.data for m in model.modules() for v in vars(m).values() if isinstance(v, QuantizedWeight))
    return step


def fused_mtp_step(model: Transformer, cache: PagedKVCache) -> FusedDecodeStep | None:
    """The fused step of the first multi-token module, or None as above."""
    if not _can_fuse(model):
        return None
    depth, module = model.config.num_hidden_layers, model.mtp_modules[0]
    join = MTPJoin(module.enorm.weight, module.hnorm.weight, _weights(module.eh_proj))
    norm = module.shared_head["norm"]
    assert isinstance(norm, RMSNorm)
    return _step(model, [module], cache.layers[depth : depth + 1], cache.dtype, norm.weight, join)


def _can_fuse(model: Transformer) -> bool:
    return isinstance(model.head_weight, QuantizedWeight) and cpu.capability() is not None and not shares_experts(model)


def _step(
    model: Transformer, blocks: Sequence[Block], stores: list[tuple[Tensor, Tensor]], cache_dtype: torch.dtype,
    norm: Tensor, join: MTPJoin | None = None,
) -> FusedDecodeStep:  # fmt: skip
    config = model.config
    frequencies, factor = model.rope
    return FusedDecodeStep(
        [_layer(block, a, b) for block, (a, b) in zip(blocks, stores, strict=True)], _sizes(config, cache_dtype),
        _quantized(model.model.embed_tokens.weight), norm, _quantized(model.head_weight), frequencies, factor,
        softmax_scale(config), config.rms_norm_eps, LATENT_NORM_EPS, config.routed_scaling_factor, join,
    )  # fmt: skip


def _sizes(config: ModelConfig, cache_dtype: torch.dtype) -> ModelSizes:
    sizes = ModelSizes(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.gqa.num_key_value_heads,
        rope_dim=config.rope_dim,
        interleave=config.rope_interleave,
        int8_kv=cache_dtype is torch.int8,
        fp8_kv=cache_dtype is torch.float8_e4m3fn,
    )
    if config.is_mla:
        mla = config.mla
        sizes.latent_dim, sizes.nope_dim, sizes.value_dim = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.v_head_dim
    if config.n_routed_experts:
        moe = config.moe
        sizes.experts, sizes.top_k = moe.n_routed_experts, moe.num_experts_per_tok
        sizes.expert_groups, sizes.groups_kept = moe.n_group, moe.topk_group
        sizes.softmax, sizes.correction_bias = moe.scoring_func == "softmax", moe.topk_method == "noaux_tc"
        sizes.group_limited = moe.topk_method != "greedy" and moe.topk_group != moe.n_group
        sizes.normalise = moe.norm_topk_prob
    return sizes


def _layer(block: Block, a: Tensor, b: Tensor) -> LayerWeights:
    """A layer's weights, with its part of the KV cache."""
    attn_norm, ffn_norm = block.input_layernorm.weight, block.post_attention_layernorm.weight
    layer, attention = LayerWeights(attn_norm=attn_norm, ffn_norm=ffn_norm, a=a, b=b), block.self_attn
    layer.o = _weights(attention.o_proj)
    if isinstance(attention, MultiHeadLatentAttention):
        layer.kv_a, layer.kv_a_norm = _weights(attention.kv_a_proj_with_mqa), attention.kv_a_layernorm.weight
        layer.kv_b = attention.kv_b_proj.weight
        if hasattr(attention, "q_proj"):
            layer.q = _weights(attention.q_proj)
        else:
            layer.q_a, layer.q_a_norm = _weights(attention.q_a_proj), attention.q_a_layernorm.weight
            layer.q = _weights(attention.q_b_proj)
    else:
        layer.q, layer.k, layer.v = (_weights(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    mlp = block.mlp
    if isinstance(mlp, MixtureOfExperts):
        layer.router = mlp.gate.weight.float()
        layer.correction = mlp.gate.e_score_correction_bias.float() if mlp.gate.method == "noaux_tc" else None
        layer.experts_in = _quantized(mlp.experts.gate_up_proj), None
        layer.experts_out = _quantized(mlp.experts.down_proj), None
        if mlp.shared_experts is None:
            return layer
        mlp = mlp.shared_experts
    layer.gate, layer.up, layer.down = (_weights(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return layer


def _weights(linear: Linear) -> Weights:
    return _quantized(linear.weight), linear.bias


def _quantized(weight: object) -> QuantizedWeight:
    """A parameter of a quantised model, which PyTorch's types know as a Tensor only."""
    assert isinstance(weight, QuantizedWeight)
    return weight
