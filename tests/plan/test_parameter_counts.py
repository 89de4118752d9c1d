"""Parameters that are computed from sizes against the tensors of the built network, on the meta device."""

from dataclasses import fields

import pytest
import torch

from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cost import (
    active_after_layers,
    active_by_layer,
    layer_parameters,
    mtp_parameters,
    multi_token_parameters,
    parameters,
    parameters_by_component,
)
from rorqual.plan.known_models import find_model, known_models

DENSE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 68, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
LATENT = DENSE | {
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
EXPERTS = LATENT | {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
VARIANTS = {
    "llama": DENSE | {"model_type": "llama"},
    "llama, one key head, wide heads": DENSE | {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 14},
    "llama, biases, tied": DENSE
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": DENSE | {"model_type": "qwen2", "num_key_value_heads": 2, "attention_bias": True},
    "qwen2, tied": DENSE | {"model_type": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "v3, dense": LATENT | {"model_type": "deepseek_v3", "q_lora_rank": 12},
    "v3, biases, tied": LATENT
    | {"model_type": "deepseek_v3", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "v3, experts": EXPERTS
    | {"model_type": "deepseek_v3", "q_lora_rank": 12, "n_shared_experts": 1, "attention_bias": True,
       "num_nextn_predict_layers": 1},
    "v3, a dense layer first, modules": EXPERTS
    | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "mlp_bias": True, "num_nextn_predict_layers": 2},
    "v3, every second layer": EXPERTS
    | {"model_type": "deepseek_v3", "moe_layer_freq": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 2},
    "v3, dense but for a module": EXPERTS
    | {"model_type": "deepseek_v3", "first_k_dense_replace": 4, "num_nextn_predict_layers": 2},
    "v2, two shared": EXPERTS | {"model_type": "deepseek_v2", "n_shared_experts": 2, "first_k_dense_replace": 2},
    "v2, no shared": EXPERTS | {"model_type": "deepseek_v2", "q_lora_rank": 12, "tie_word_embeddings": True},
}  # fmt: skip


def of(name):
    return ModelConfig(**VARIANTS[name]) if name in VARIANTS else find_model(name)


def tensors(config):
    """(name, numbers) of each parameter, of the main model and of multi-token modules."""
    with torch.device("meta"):
        named = [(name, p.numel()) for name, p in Transformer(config).named_parameters()]
    ahead = tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
    return [pair for pair in named if not pair[0].startswith(ahead)], [p for p in named if p[0].startswith(ahead)]


def component(name):
    parts = [("embed_tokens", "embedding"), ("lm_head", "head"), ("norm", "norms"), ("self_attn", "attention"),
             ("shared_experts", "shared_experts"), (".experts.", "routed_experts"), ("mlp.gate.", "router"),
             ("mlp", "dense_feed_forward")]  # fmt: skip
    return next(found for part, found in parts if part in name)


@pytest.mark.parametrize("name", [*VARIANTS, *known_models()])
def test_counts_are_those_of_the_tensors(name):
    config = of(name)
    main, ahead = tensors(config)
    assert parameters(config)[0] == sum(n for _, n in main)
    assert mtp_parameters(config) == sum(n for _, n in ahead)
    wanted = dict.fromkeys(parameters_by_component(config), 0)
    for tensor, n in main:
        wanted[component(tensor)] += n
    wanted["multi_token"] = sum(n for _, n in ahead)
    assert parameters_by_component(config) == wanted
    # A token is multiplied with its own experts, and not with the embedding.
    share = config.moe.num_experts_per_tok / config.moe.n_routed_experts if config.n_routed_experts else 0
    active = {kind: n * share if kind == "routed_experts" else n for kind, n in wanted.items() if kind != "multi_token"}
    active["embedding"] *= config.tie_word_embeddings
    assert parameters(config)[1] == sum(active.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_are_those_of_the_tensors(name):
    config = of(name)
    main, ahead = tensors(config)
    layers = config.num_hidden_layers
    for index in range(layers + config.num_nextn_predict_layers):
        own = [(t, n) for t, n in [*main, *ahead] if t.startswith(f"model.layers.{index}.")]
        routed = sum(n for t, n in own if ".experts." in t)
        modules = multi_token_parameters(config)
        found = layer_parameters(config, config.is_moe_layer(index)) if index < layers else modules[index - layers]
        assert (found.shared, found.routed) == (sum(n for _, n in own) - routed, routed)
    each = active_by_layer(config)
    share = config.moe.num_experts_per_tok / config.moe.n_routed_experts if config.n_routed_experts else 0
    used = sum(n * share if ".experts." in t else n for t, n in [*main, *ahead])
    table = config.vocab_size * config.hidden_size
    tables = table * (1 + (not config.tie_word_embeddings))
    heads = table * (1 + config.num_nextn_predict_layers)
    assert sum(each) + active_after_layers(config) == used - tables + heads


def test_variants_have_all_that_counts():
    """A size that no variant changes would not be tested."""
    sizes = {f.name for f in fields(ModelConfig)} - {
        "max_position_embeddings", "rms_norm_eps", "initializer_range", "rope_theta", "rope_scaling", "rope_interleave",
        "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
        "bos_token_id", "eos_token_id", "pad_token_id",
    }  # fmt: skip
    assert set().union(*VARIANTS.values()) == sizes
