"""Small models of every supported architecture, with weights large and uneven enough for a mistake to show."""

import torch

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 0,
}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 1}
V3 = BASE | MLA | MOE | {"model_type": "deepseek_v3", "first_k_dense_replace": 1}
V2 = BASE | MLA | MOE | {"model_type": "deepseek_v2", "first_k_dense_replace": 1}
QWEN2 = BASE | {"model_type": "qwen2", "num_key_value_heads": 2, "attention_bias": True, "rope_interleave": False}
LLAMA = BASE | {"model_type": "llama", "rope_interleave": False}


def yarn(factor, mscale, all_dim):
    return {
        "rope_type": "yarn",
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 2048,  # some frequencies kept, some interpolated, some between
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Where transformers departs from DeepSeek's own code, no config can tell: its V2 router never renormalises
# (the released V2 configs have norm_topk_prob false), and its V3 router is always sigmoid with a bias.
CONFIGS = {
    "v3": V3 | {"q_lora_rank": 12, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "v3-yarn": V3
    | {"q_lora_rank": 12, "n_group": 2, "topk_group": 1, "rope_scaling": yarn(40, 1.0, 1.0)}
    | {"rope_theta": 500.0, "qk_rope_head_dim": 16},
    "v3-yarn-two-mscales": V3 | {"rope_scaling": yarn(4, 0.7, 1.3), "rope_theta": 500.0},
    "v3-half-split": V3 | {"rope_interleave": False, "n_shared_experts": 2},
    "v3-not-renormalised": V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.7, "v_head_dim": 16},
    "v3-no-shared-expert": V3 | {"n_shared_experts": 0, "first_k_dense_replace": 0, "num_experts_per_tok": 2},
    "v3-bias": V3 | {"q_lora_rank": 12, "attention_bias": True, "v_head_dim": 6, "rms_norm_eps": 1e-4},
    "v3-dense": V3 | {"first_k_dense_replace": 3, "tie_word_embeddings": True},
    "v2": V2
    | {"q_lora_rank": 12, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    | {"routed_scaling_factor": 16.0, "rope_scaling": yarn(40, 0.707, 0.707)},
    "v2-lite": V2 | {"n_shared_experts": 2, "rope_scaling": yarn(40, 0.707, 0.707)},
    "v2-plain": V2 | {"first_k_dense_replace": 0, "q_lora_rank": 10, "attention_bias": True},
    "qwen2": QWEN2 | {"rope_theta": 1e6},
    "qwen2-tied-one-kv-head": QWEN2 | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2-yarn": QWEN2
    | {"rope_scaling": {k: v for k, v in yarn(4, 1, 1).items() if "mscale" not in k}, "rope_theta": 500.0},
    "llama": LLAMA | {"tie_word_embeddings": True},
    "llama3": LLAMA | {"num_key_value_heads": 2, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "num_key_value_heads": 2},
    "llama-yarn-untruncated": LLAMA
    | {"rope_scaling": {k: v for k, v in yarn(4, 1, 1).items() if "mscale" not in k} | {"truncate": False}}
    | {"rope_theta": 500.0},
    "llama-linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def build(fields, seed=0, **changes):
    """A model of the config `fields` with random matrices, norms, biases and router correction biases."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(fields | changes)))
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                t.uniform_(0.5, 1.5)
            elif "correction" in name:
                t.normal_(std=0.7)  # enough to make some scores negative
            elif "bias" in name:
                t.normal_(std=0.2)
    return model.eval()
