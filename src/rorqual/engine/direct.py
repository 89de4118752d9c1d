"""The short way through a decode step, for networks that have one."""

from rorqual.engine.cache import BlockCache
from rorqual.kernels import cpu
from rorqual.kernels.lowbit import Packed
from rorqual.kernels.step import DecodeStep, LayerWeights
from rorqual.model import Transformer
from rorqual.model.attention import GroupedQueryAttention
from rorqual.model.layers import Linear, SwiGLU
from rorqual.model.rope import softmax_scale


def direct_step(model: Transformer, cache: BlockCache) -> DecodeStep | None:
    """For dense grouped-query networks with packed weights, where the compiled functions are; else None."""
    config = model.config
    dense = not config.is_mla and not model.moe_layers()
    if not isinstance(model.head_weight, Packed) or not dense or cpu.capability() is None:
        return None
    layers = []
    for layer, (keys, values) in zip(model.model.layers, cache.layers, strict=True):
        a, m = layer.self_attn, layer.mlp
        assert isinstance(a, GroupedQueryAttention)
        assert isinstance(m, SwiGLU)
        layers.append(
            LayerWeights(
                layer.input_layernorm.weight, _of(a.q_proj), _of(a.k_proj), _of(a.v_proj), _of(a.o_proj),
                layer.post_attention_layernorm.weight, _of(m.gate_proj), _of(m.up_proj), _of(m.down_proj), keys, values,
            )
        )  # fmt: skip
    frequencies, factor = model.rope
    return DecodeStep(
        layers, model.model.embed_tokens.weight, model.model.norm.weight, model.head_weight,
        config.num_attention_heads, config.rope_interleave, frequencies, factor, softmax_scale(config),
        config.rms_norm_eps,
    )  # fmt: skip


def _of(linear: Linear) -> tuple[Packed, object]:
    return linear.weight, linear.bias
