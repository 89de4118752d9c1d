"""Whatever in config.json would make another network is computed or refused by name."""

import json

import pytest

from helpers.reference_models import LLAMA, QWEN2, V2, V3
from rorqual.errors import UserError
from rorqual.model import ModelConfig

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (V3 | {"hidden_act": "relu"}, "hidden_act"),
        (QWEN2 | {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        (LLAMA | {"hidden_act": 7}, "hidden_act"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "sliding_window"),
        (QWEN2 | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 8}, "layer_types"),
        (LLAMA | {"sliding_window": 8}, "sliding_window"),
        (LLAMA | {"layer_types": ["linear_attention"] * 3}, "layer_types"),
        (LLAMA | {"layer_types": 3}, "layer_types"),
        (QWEN2 | {"use_sliding_window": "yes"}, "use_sliding_window"),
        (LLAMA | {"sliding_window": "8"}, "sliding_window"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters.full_attention"),
        (LLAMA | {"rope_parameters": 7}, "rope_parameters"),
        (LLAMA | {"rope_scaling": "yarn"}, "rope_scaling"),
        (LLAMA | {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 8.0}}, "rope_scaling and rope_par"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "'longrope'"),
        (LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type = 'su'"),
        (LLAMA | {"rope_scaling": YARN | {"truncate": "no"}}, "truncate"),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor"),
        (LLAMA | {"rope_interleave": True}, "rope_interleave"),
        (LLAMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA | {"logits_scaling": 8.0}, "logits_scaling"),
        (LLAMA | {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        (LLAMA | {"clip_qkv": 8.0}, "clip_qkv"),
        (LLAMA | {"is_causal": False}, "is_causal"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "n_routed_experts"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func"),
        (V3 | {"topk_method": "greedy"}, "topk_method"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func"),
        (V2 | {"topk_method": "noaux_tc"}, "topk_method"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2 | {"rope_interleave": False}, "rope_interleave"),
        (LLAMA | {"eos_token_id": "2"}, "eos_token_id"),
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ],
)
def test_refused_by_name(fields, name):
    with pytest.raises(UserError, match=rf"^config\.json: .*{name}"):
        ModelConfig.from_dict(fields)


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_act": "silu"}, {"hidden_act": "swish"}, {"hidden_act": None}, {"attention_dropout": 0.1},
        {"sliding_window": None}, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0},
        {"layer_types": ["full_attention"] * 3}, {"max_window_layers": 28, "use_sliding_window": True},
        {"rope_scaling": None, "rope_parameters": None}, {"rope_scaling": {"type": "default"}},
        {"partial_rotary_factor": 1.0, "embedding_multiplier": 1.0, "attn_logit_softcapping": None},
        {"attention_bias": None, "rope_theta": None, "rms_norm_eps": None, "num_nextn_predict_layers": None},
        {"unsloth_version": "2026.1", "pretraining_tp": 1, "torch_dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_passed_over(more):
    assert ModelConfig.from_dict(QWEN2 | more) == ModelConfig.from_dict(QWEN2)


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 500.0}, 500.0, None),
        ({"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": None}, 500.0, LINEAR),
        ({"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_theta": 9.0}, 500.0, LINEAR),
        ({"rope_parameters": LINEAR | {"rope_theta": None}, "rope_theta": 9.0}, 9.0, LINEAR),
        ({"rope_scaling": LINEAR | {"rope_theta": 500.0}}, 500.0, LINEAR),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 500.0}}, 500.0, LINEAR),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10000.0, LINEAR),
        ({"rope_scaling": {"type": "mrope", "rope_type": "linear", "factor": 4.0}}, 10000.0, LINEAR),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0, None),
        ({"rope_scaling": YARN | {"mscale": None, "truncate": False}}, 10000.0, YARN | {"truncate": False}),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 16}, 10000.0,
            YARN | {"original_max_position_embeddings": 16},
        ),
    ],
)  # fmt: skip
def test_rope_is_read_in_all_its_forms(rope, theta, scaling):
    config = ModelConfig.from_dict(LLAMA | rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("name", ["n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"])
def test_a_release_with_experts_says_how_they_are_chosen(tmp_path, name):
    whole = ModelConfig.from_dict(V3).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert ModelConfig.load(tmp_path) == ModelConfig.from_dict(whole)
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
    with pytest.raises(UserError, match=f"{name} is missing"):
        ModelConfig.load(tmp_path)
