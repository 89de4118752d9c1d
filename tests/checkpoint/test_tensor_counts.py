"""Parameter counts of the released networks equal the published ones, from their public config.json."""

import pytest

from rorqual.checkpoint.release_tensors import meta_model
from rorqual.model.config import ModelConfig

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = LATENT | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
V2 = LATENT | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 2,
    "n_routed_experts": 160,
    "routed_scaling_factor": 16.0,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 3,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("raw", "published"),
    [
        (V3 | {"num_nextn_predict_layers": 0}, 671_026_419_200),  # "671 B"
        (V2, 235_741_434_880),  # "236 B"; the count on the model's page
        (V2_LITE, 15_706_484_224),  # "15.7 B"; the count on the model's page
        (QWEN_7B, 7_615_616_512),  # "7.62 B" (Qwen2.5, also R1-Distill-Qwen-7B)
        (LLAMA_8B, 8_030_261_248),  # "8.03 B" (also R1-Distill-Llama-8B)
    ],
    ids=["v3", "v2", "v2-lite", "qwen2-7b", "llama3-8b"],
)
def test_published_parameters(raw, published):
    model = meta_model(ModelConfig.from_dict(raw))
    # the router's correction bias is in the release, and in the count, though it has no gradient
    assert sum(t.numel() for t in model.state_dict().values()) == published


def test_multi_token_module_of_v3():
    # "685 B" of weights in the release: 671 B, the module, and its copies of embedding and head
    model = meta_model(ModelConfig.from_dict(V3))
    shared = 2 * model.model.embed_tokens.weight.numel()
    assert round((sum(p.numel() for p in model.parameters()) + shared) / 1e9) in (684, 685)
