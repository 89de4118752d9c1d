"""GGUF files of small networks, as llama.cpp's converter writes them; names are the gguf library's."""

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from rorqual.model import ModelConfig, Transformer

KINDS = gguf.GGMLQuantizationType
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), "<think>"]
TYPES = [3] * 3 + [1] * (len(TOKENS) - 4) + [4]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA = ModelConfig(
    model_type="llama", vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=100000.0,
    rope_interleave=False, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
QWEN2 = LLAMA.replace(model_type="qwen2", attention_bias=True)
YARN = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
# In the manner of V2-Lite: queries without a low rank, the best softmax scores, YaRN.
V2_LITE = ModelConfig(
    model_type="deepseek_v2", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
    n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2, moe_intermediate_size=40, first_k_dense_replace=1,
    topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, rope_scaling=YARN, initializer_range=0.2,
    max_position_embeddings=640, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
# In the manner of V3: a low rank, sigmoid scores with a bias for choosing, groups.
V3 = V2_LITE.replace(
    model_type="deepseek_v3", q_lora_rank=48, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
    rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, moe_intermediate_size=48,
)  # fmt: skip
# Sizes that Q4_K and Q6_K can hold.
LLAMA_OF_256 = LLAMA.replace(hidden_size=256, intermediate_size=256, head_dim=64, tie_word_embeddings=False)
LATENT_OF_256 = {
    "hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 256, "kv_lora_rank": 256, "v_head_dim": 64,
    "moe_intermediate_size": 256,
}  # fmt: skip
NEXTN = {"eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "shared_head.norm": "shared_head_norm"}


def network(config=LLAMA):
    """A model of random weights; its norms and router biases are random too."""
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
        for bias in model.buffers():
            bias.normal_(std=0.1)
    return model


def header(config, split):
    """The architecture's fields, as the converter writes them; `split` as in `tensors`."""
    kind = "deepseek2" if config.is_mla else config.model_type
    fields = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if config.is_mla and split else config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if not config.is_mla and config.head_dim * config.num_attention_heads != config.hidden_size:
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {f"{kind}.{name}": v for name, v in (fields | (_latent(config, split) if config.is_mla else {})).items()}


def _latent(config, split):
    widths = {"key_length": config.qk_nope_head_dim + config.qk_rope_head_dim, "value_length": config.v_head_dim}
    if split:  # the heads' widths have other names; these are those of latents, which all heads share
        latent = {"key_length": config.kv_lora_rank + config.qk_rope_head_dim, "value_length": config.kv_lora_rank}
        widths = {f"{name}_mla": width for name, width in widths.items()} | latent
    fields = {f"attention.{name}": width for name, width in widths.items()} | {
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob or None,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[config.scoring_func],
        "nextn_predict_layers": config.num_nextn_predict_layers or None,
    }
    if scaling := config.rope_scaling:
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling["factor"],
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
        }
    return fields


VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}


def permute(weights, heads):
    """As the converter does for llama's queries and keys."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def tensors(model, split):
    """(name, values) as the converter makes them of a release; `split`: keys' and values' up-projections apart."""
    config = model.config
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    architecture = gguf.MODEL_ARCH[{"llama": "LLAMA", "qwen2": "QWEN2"}.get(config.model_type, "DEEPSEEK2")]
    names = gguf.get_tensor_name_map(architecture, depth)

    def named(name, values):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found, values

    for name, t in (*model.named_parameters(), *model.named_buffers()):
        values = t.detach().numpy()
        layer, _, inner = name.partition(".layers.")[2].partition(".")
        own = inner.removesuffix(".weight")
        if own in NEXTN:
            yield f"blk.{layer}.nextn.{NEXTN[own]}.weight", values
        elif inner == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=1), strict=True):
                yield named(name.replace("gate_up_proj", f"{part}.weight"), half)
        elif inner == "mlp.experts.down_proj":
            yield named(f"{name}.weight", values)
        elif inner == "mlp.gate.e_score_correction_bias":
            yield named(name.replace("_correction_bias", "_correction.bias"), values)
        elif own == "self_attn.kv_b_proj" and split:
            heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, of_values = np.split(heads, [config.qk_nope_head_dim], axis=1)
            yield named(name.replace("kv_b_proj", "k_b_proj"), keys.transpose(0, 2, 1))
            yield named(name.replace("kv_b_proj", "v_b_proj"), of_values)
        elif config.model_type == "llama" and own.removesuffix(".bias") in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in own else config.num_key_value_heads
            yield named(name, permute(values, heads))
        else:
            yield named(name, values)


def quantised(values, kind):
    """Blocks of a type. The library cannot make Q4_K and Q6_K: these are random, with small scales."""
    if kind not in (KINDS.Q4_K, KINDS.Q6_K):
        return gguf.quantize(np.ascontiguousarray(values, np.float32), kind)
    rng, size = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // 256, size), dtype=np.uint8)
    scales = rng.uniform(1e-4, 1e-3, (*data.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    if kind == KINDS.Q4_K:
        data[..., :4] = scales
    else:
        data[..., -2:] = scales[..., :2]
    return data.reshape(*values.shape[:-1], -1)


def write(path, model, kind=None, split=True, extra=None, **fields):
    """A GGUF file of `model`, its matrices of type `kind` where they fit; `fields`, with __ for dots, replace or
    (None) leave out those of the header; `extra` tensors come on top."""
    architecture = "deepseek2" if model.config.is_mla else model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    values = (
        header(model.config, split) | VOCABULARY | {name.replace("__", "."): value for name, value in fields.items()}
    )
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for name, value in values.items():
        if value is not None:
            add[type(value)](name, value)
    for name, t in tensors(model, split):
        router = name.endswith(("ffn_gate_inp.weight", ".bias"))
        if kind is not None and t.ndim > 1 and not router and t.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, quantised(t, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(t))
    for name, t in (extra or {}).items():
        writer.add_tensor(name, t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
