"""Parameters and FLOPs per token of a model, computed from its sizes.

MTP modules are counted separately, as in the releases (V3: 671 B, plus 14 B for the module, 685 B on disk).
"""

from dataclasses import dataclass

from rorqual.model.config import ModelConfig


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token), without MTP modules.

    Active are the weights that a token is multiplied with: its experts and the head, not the embedding lookup.
    V3 then has 671.0 B and 36.6 B, V2 235.7 B and 20.9 B, V2-Lite 15.7 B and 2.5 B (published: 671 and 37,
    236 and 21, 15.7 and 2.4).
    """
    table = config.vocab_size * config.hidden_size
    total, active = _embedding(config) + config.hidden_size, table + config.hidden_size
    for layer in range(config.num_hidden_layers):
        stored, used = _layer(config, config.is_moe_layer(layer))
        total, active = total + stored, active + used
    return total, active


def parameters_by_component(config: ModelConfig) -> dict[str, int]:
    """Parameters by what they are of; they add up to all of the model, multi-token modules included, which are one
    component. A norm's are norms, also within attention; a tied head has none of its own.
    """
    D, table = config.hidden_size, config.vocab_size * config.hidden_size
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    layers, mixtures = len(kinds), sum(kinds)
    inner = (config.mla.q_lora_rank or 0) + config.mla.kv_lora_rank if config.is_mla else 0  # norms within attention
    found = {
        "embedding": table,
        "attention": layers * (_attention(config) - inner),
        "dense_feed_forward": (layers - mixtures) * _feed_forward(config, False)[0],
        "shared_experts": 0,
        "routed_experts": 0,
        "router": 0,
        "norms": layers * (2 * D + inner) + D,
        "head": 0 if config.tie_word_embeddings else table,
        "multi_token": mtp_parameters(config),
    }
    if mixtures:
        expert = 3 * D * config.moe.moe_intermediate_size
        found["shared_experts"] = mixtures * config.moe.n_shared_experts * expert
        found["routed_experts"] = mixtures * config.moe.n_routed_experts * expert
        found["router"] = mixtures * config.moe.n_routed_experts * D
    return found


def mtp_parameters(config: ModelConfig) -> int:
    """Additional parameters of the MTP modules; embedding and head are shared (V3 §2.2)."""
    return sum(module.shared + module.routed for module in multi_token_parameters(config))


@dataclass(frozen=True)
class LayerParameters:
    shared: int  # all but those of routed experts
    routed: int


def layer_parameters(config: ModelConfig, moe: bool) -> LayerParameters:
    """Of a layer of the main model, or of a multi-token module's."""
    stored, routed = _layer(config, moe)[0], 0
    if moe:
        routed = 3 * config.hidden_size * config.moe.moe_intermediate_size * config.moe.n_routed_experts
    return LayerParameters(stored - routed, routed)


def multi_token_kinds(config: ModelConfig) -> list[bool]:
    """Whether the layer of each multi-token module has experts."""
    layers = config.num_hidden_layers
    return [config.is_moe_layer(layers + k) for k in range(config.num_nextn_predict_layers)]


def multi_token_parameters(config: ModelConfig) -> list[LayerParameters]:
    """Of each multi-token module, without embedding and head, which it shares."""
    layers = [layer_parameters(config, moe) for moe in multi_token_kinds(config)]
    return [LayerParameters(layer.shared + _mtp_extra(config), layer.routed) for layer in layers]


def active_by_layer(config: ModelConfig) -> list[int]:
    """Parameters of each layer of the main model that a token is multiplied with."""
    return [_layer(config, config.is_moe_layer(layer))[1] for layer in range(config.num_hidden_layers)]


def active_after_layers(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with after the layers: norm, MTP modules, and the head once for each."""
    head = config.vocab_size * config.hidden_size
    modules = sum(_layer(config, moe)[1] + _mtp_extra(config) + head for moe in multi_token_kinds(config))
    return config.hidden_size + modules + head


def cache_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Of the KV cache, for a token of context: 70 272 for V3, 327 680 for Qwen2.5-72B (HW table 1)."""
    if config.is_mla:
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
    else:
        width = 2 * config.gqa.num_key_value_heads * config.gqa.head_dim
    return config.num_hidden_layers * width * itemsize


def flops_per_token(config: ModelConfig, sequence_length: int, training: bool = True, frozen: bool = False) -> float:
    """FLOPs per token of a sequence of this length, without MTP modules.

    2 per active weight, plus causal attention over half the sequence on average; training costs three forward passes,
    less the gradients of weights where they are `frozen` (LoRA, whose low-rank products are not counted).
    GFLOP at 4096 tokens (and HW table 2): V3 250.5 (250), V2 155.3 (155), LLaMA-3.1-405B 2473 (2448), Qwen2.5-72B 445
    (394, which is below 6 FLOPs per parameter).
    """
    forward = sum(flops.forward for flops in flops_by_layer(config, sequence_length))
    forward += 2.0 * config.vocab_size * config.hidden_size
    if not training:
        return forward
    weights = sum(flops.products for flops in flops_by_layer(config, sequence_length))
    return 3 * forward - (weights + 2.0 * config.vocab_size * config.hidden_size if frozen else 0.0)


def mtp_flops_per_token(config: ModelConfig, sequence_length: int, frozen: bool = False) -> float:
    """Additional training FLOPs per token of the MTP modules: a layer, a projection and the head at each depth."""
    after, head = flops_after_layers(config, sequence_length), 2.0 * config.vocab_size * config.hidden_size
    return 3 * (after.forward - head) - (after.products - head if frozen else 0.0)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of a forward pass. The backward pass has twice as many, for gradients of inputs and of weights;
    attention has no weights.
    """

    products: float  # with weights
    attention: float  # causal, over half the sequence on average

    @property
    def forward(self) -> float:
        return self.products + self.attention


def flops_by_layer(config: ModelConfig, sequence_length: int) -> list[Flops]:
    """Of each layer of the main model."""
    return [_layer_flops(config, config.is_moe_layer(i), sequence_length) for i in range(config.num_hidden_layers)]


def flops_after_layers(config: ModelConfig, sequence_length: int, ahead: bool = True) -> Flops:
    """Of the head, and with `ahead` of the MTP modules, each with the head again."""
    D, head = config.hidden_size, 2.0 * config.vocab_size * config.hidden_size
    layers = [_layer_flops(config, moe, sequence_length) for moe in multi_token_kinds(config)] if ahead else []
    products = head + sum(layer.products + 4.0 * D * D + head for layer in layers)
    return Flops(products, sum(layer.attention for layer in layers))


@dataclass(frozen=True)
class Memory:
    """Training memory in bytes, by use; they add up to the most at one time."""

    weights: int
    masters: int
    gradients: int
    moments: int
    ema: int
    activations: int
    loss: int
    update: int = 0  # what the optimizer's step needs beside its state
    apart: int = 0  # at most 0: what of all this is not there at the same time

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def loss_bytes(config: ModelConfig, tokens: int, size: int, tensor: int = 1, compiled: bool = False) -> int:
    """Of the loss and, for each multi-token module, another: the head's FP32 gradient, and in 16 bits a copy, and the
    gradient of the hidden states, of `size` bytes a value, beside the last norm's input and output; and logits
    (kernels/cross_entropy.py). tensor: ranks that share the head.
    """
    V, D = config.vocab_size, config.hidden_size
    head = V * D // tensor * (4 if size == 4 else 4 + size)
    return logits_bytes(config, tokens, size, compiled) + (1 + config.num_nextn_predict_layers) * (
        head + 3 * tokens * D * size
    )


def logits_bytes(config: ModelConfig, tokens: int, size: int, compiled: bool = False) -> int:
    """One chunk of logits. compiled: whether the softmax is computed in place; its reference has them three times."""
    if not compiled:
        return 3 * min(64 << 20, 4 * tokens * config.vocab_size)
    rows = max(1, min(tokens, 1024, (64 << 20) // (size * config.vocab_size)))
    return rows * config.vocab_size * size


def _embedding(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def _attention(config: ModelConfig) -> int:
    D, H = config.hidden_size, config.num_attention_heads
    if config.is_mla:
        mla = config.mla
        queries, values = H * mla.qk_head_dim, H * mla.v_head_dim
        C, low = mla.kv_lora_rank, mla.q_lora_rank
        count = D * low + low + low * queries if low else D * queries
        count += D * (C + mla.qk_rope_head_dim) + C
        count += C * (H * mla.qk_nope_head_dim + values) + values * D
        if config.attention_bias:
            count += (low or 0) + C + mla.qk_rope_head_dim + D
        return count
    gqa = config.gqa
    queries, keys = H * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim
    bias = queries + 2 * keys if config.attention_bias else 0
    if bias and config.model_type == "llama":
        bias += D
    return 2 * D * queries + 2 * D * keys + bias


def _feed_forward(config: ModelConfig, moe: bool) -> tuple[int, int]:
    """Parameters (stored, active per token)."""
    D = config.hidden_size
    if not moe:
        width = config.intermediate_size
        count = 3 * D * width + (2 * width + D if config.mlp_bias else 0)
        return count, count
    sizes = config.moe
    expert = 3 * D * sizes.moe_intermediate_size
    always = sizes.n_shared_experts * expert + sizes.n_routed_experts * D
    return always + sizes.n_routed_experts * expert, always + sizes.num_experts_per_tok * expert


def _layer(config: ModelConfig, moe: bool) -> tuple[int, int]:
    both = _attention(config) + 2 * config.hidden_size
    stored, used = _feed_forward(config, moe)
    return both + stored, both + used


def _mtp_extra(config: ModelConfig) -> int:
    return 2 * config.hidden_size**2 + 3 * config.hidden_size


def _layer_flops(config: ModelConfig, moe: bool, sequence_length: int) -> Flops:
    widths = config.mla.qk_head_dim + config.mla.v_head_dim if config.is_mla else 2 * config.gqa.head_dim
    scores_and_sums = 2.0 * (sequence_length / 2) * config.num_attention_heads * widths
    return Flops(2.0 * (_attention(config) + _feed_forward(config, moe)[1]), scores_and_sums)
