"""ModelConfig and release settings from a GGUF file, as llama.cpp's converters write them.

Sizes come from the tensors where possible, so that a damaged header cannot ask for a huge network.
"""

import math
from collections.abc import Mapping
from types import EllipsisType
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from rorqual.checkpoint.gguf_file import GGUFTensor
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.release_settings import ReleaseSettings
from rorqual.model.rope import rope_frequencies
from rorqual.strict_json import Json

Fields: TypeAlias = Mapping[str, Json]  # the header's values
Stored: TypeAlias = Mapping[str, GGUFTensor]
ARCHITECTURES = ("llama", "qwen2", "deepseek2")
# Sampling keys of a header (gguf-py, Keys.General) → their names in generation_config.json.
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
    # transformers has no names for these.
    "general.sampling.penalty_last_n": "penalty_last_n",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.mirostat": "mirostat",
}
# Keys of an architecture that would need another network → values with which they change nothing.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0, 1),
    "attention.indexer.top_k": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "use_parallel_residual": (False,),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
}
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's expert_gating_func


def config_of(fields: Fields, stored: Stored) -> ModelConfig:
    """Raises UserError for another architecture, and for values that are missing or impossible."""
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} cannot be imported; only {', '.join(ARCHITECTURES)} can")
    vocabulary, hidden = shape(stored, "token_embd.weight", 2)
    heads = number(fields, f"{architecture}.attention.head_count")
    own = _latent if architecture == "deepseek2" else _grouped
    sizes = own(fields, stored, architecture, heads)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = number(fields, f"tokenizer.ggml.{theirs}_token_id", None, least=0, below=vocabulary)
        sizes[f"{ours}_token_id"] = token
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_attention_heads=heads,
        tie_word_embeddings="output.weight" not in stored,
        max_position_embeddings=number(fields, f"{architecture}.context_length"),
        rms_norm_eps=real(fields, f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope_theta=real(fields, f"{architecture}.rope.freq_base", 10000.0),
        initializer_range=0.02,
        **sizes,
    )
    _check_supported(fields, config, architecture)
    return config.replace(rope_scaling=_rope_scaling(fields, stored, config, architecture))


def released_of(fields: Fields, config: ModelConfig) -> ReleaseSettings:
    """Release settings from a header. Raises UserError for invalid values."""
    below = config.vocab_size
    ends = [number(fields, f"tokenizer.ggml.{t}_token_id", None, least=0, below=below) for t in ("eos", "eot", "eom")]
    generation = {theirs: _shortest_float(fields[ours]) for ours, theirs in SAMPLING.items() if ours in fields}
    generation["eos_token_id"] = list(dict.fromkeys(t for t in ends if t is not None)) or None
    window = number(fields, "general.sampling.penalty_last_n", -1, least=-1)
    if window >= config.max_position_embeddings or generation.get("repetition_penalty", 1) == 1:
        generation.pop("penalty_last_n", None)  # has no effect
    return ReleaseSettings.of(config, generation, "general.sampling")


def _shortest_float(value: Json) -> Json:
    return float(str(np.float32(value))) if isinstance(value, float) else value  # 0.6, not 0.6000000238418579


def _check_supported(fields: Fields, config: ModelConfig, architecture: str) -> None:
    """Raises UserError for keys that would need another network than this one."""
    for name, neutral in NEUTRAL.items():
        value = fields.get(f"{architecture}.{name}")
        if value is not None and not any(value == n for n in neutral):
            raise UserError(f"{architecture}.{name} = {value!r:.60} is not supported; use another file")
    window, context = fields.get(f"{architecture}.attention.sliding_window"), config.max_position_embeddings
    if window and not (type(window) is int and window >= context):
        raise UserError(
            f"{architecture}.attention.sliding_window = {window!r:.60} is not supported, and is shorter than the "
            f"context of {context}; use another file"
        )
    width = config.qk_rope_head_dim if config.is_mla else config.head_dim
    rotary = fields.get(f"{architecture}.rope.dimension_count", width)
    if rotary != width:
        raise UserError(
            f"{architecture}.rope.dimension_count = {rotary!r:.60} of {width}: partial rotary embedding is not "
            "supported; use another file"
        )


def _grouped(fields: Fields, stored: Stored, architecture: str, heads: int) -> dict[str, Any]:
    if fields.get(f"{architecture}.expert_count"):
        raise UserError(f"{architecture} with experts cannot be imported; only dense files of it can")
    hidden = shape(stored, "token_embd.weight", 2)[1]
    return {
        "model_type": architecture,
        "intermediate_size": shape(stored, "blk.0.ffn_gate.weight", 2)[0],
        "num_hidden_layers": _blocks(stored),
        "num_key_value_heads": number(fields, f"{architecture}.attention.head_count_kv", heads),
        "head_dim": number(fields, f"{architecture}.attention.key_length", hidden // heads),
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_down.bias" in stored,
        "rope_interleave": False,
    }


def _latent(fields: Fields, stored: Stored, architecture: str, heads: int) -> dict[str, Any]:
    """V2, V2-Lite, V3 and R1. Files from before May 2025 have the KV up-projection in one tensor."""
    latent = shape(stored, "blk.0.attn_kv_a_norm.weight", 1)[0]
    value = shape(stored, "blk.0.attn_output.weight", 2)[1] // heads
    if "blk.0.attn_k_b.weight" in stored:
        plain = shape(stored, "blk.0.attn_k_b.weight", 3)[2]
    else:
        plain = shape(stored, "blk.0.attn_kv_b.weight", 2)[0] // heads - value
    mtp_depth = sum(name.endswith(".nextn.eh_proj.weight") for name in stored)
    low_rank = "blk.0.attn_q_a_norm.weight"
    sizes = {
        "model_type": "deepseek_v2",
        "num_hidden_layers": _blocks(stored) - mtp_depth,
        "num_nextn_predict_layers": mtp_depth,
        "q_lora_rank": shape(stored, low_rank, 1)[0] if low_rank in stored else None,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": shape(stored, "blk.0.attn_kv_a_mqa.weight", 2)[0] - latent,
        "v_head_dim": value,
        "first_k_dense_replace": sum(_is(name, "ffn_gate") for name in stored),
    }
    if sizes["first_k_dense_replace"]:
        sizes["intermediate_size"] = shape(stored, "blk.0.ffn_gate.weight", 2)[0]
    else:
        sizes["intermediate_size"] = number(fields, f"{architecture}.feed_forward_length", 0, least=0)
    router = min((name for name in stored if _is(name, "ffn_gate_inp")), default=None)
    return sizes if router is None else sizes | _experts(fields, stored, architecture, router.split(".")[1])


def _experts(fields: Fields, stored: Stored, architecture: str, block: str) -> dict[str, Any]:
    """Experts, from layer `block`. The default scoring function is softmax, the default number of groups 1."""
    width = shape(stored, f"blk.{block}.ffn_down_exps.weight", 3)[2]
    shared = f"blk.{block}.ffn_gate_shexp.weight"
    groups = number(fields, f"{architecture}.expert_group_count", 1, least=0)
    scores = fields.get(f"{architecture}.expert_gating_func", SOFTMAX)
    if scores not in (SOFTMAX, SIGMOID):
        raise UserError(f"{architecture}.expert_gating_func = {scores!r} must be 1 (softmax) or 2 (sigmoid)")
    if any(_is(name, "exp_probs_b", "bias") for name in stored):
        method = "noaux_tc"
    else:
        method = "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if scores == SIGMOID else "deepseek_v2",
        "n_routed_experts": shape(stored, f"blk.{block}.ffn_gate_inp.weight", 2)[0],
        "n_shared_experts": shape(stored, shared, 2)[0] // width if shared in stored else 0,
        "num_experts_per_tok": number(fields, f"{architecture}.expert_used_count"),
        "moe_intermediate_size": width,
        "n_group": max(groups, 1),
        "topk_group": number(fields, f"{architecture}.expert_group_used_count", 1) if groups > 1 else 1,
        "scoring_func": "sigmoid" if scores == SIGMOID else "softmax",
        "topk_method": method,
        "norm_topk_prob": bool(fields.get(f"{architecture}.expert_weights_norm", False)),
        "routed_scaling_factor": real(fields, f"{architecture}.expert_weights_scale", 1.0),
    }


def _rope_scaling(fields: Fields, stored: Stored, config: ModelConfig, architecture: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in stored:  # Llama 3.1's scaling, as a divisor of each frequency
        divisors = stored["rope_freqs.weight"]
        plain, _ = rope_frequencies(config)
        for factor in (8.0, 32.0):  # as released: 3.1 and R1-Distill-Llama; 3.2
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            scaling["original_max_position_embeddings"] = 8192
            stretched, _ = rope_frequencies(config.replace(rope_scaling=scaling))
            if divisors.shape != plain.shape:
                break
            if torch.allclose(divisors.expand(divisors.blocks(0, 1))[0], plain / stretched, rtol=1e-3):
                return scaling
        raise UserError("rope_freqs.weight is not Llama 3's; other RoPE scaling factors are not supported")
    name = f"{architecture}.rope.scaling"
    # A factor without a type means linear, as in llama.cpp; old files name it scale_linear.
    factor = f"{name}.factor" if f"{name}.factor" in fields else f"{architecture}.rope.scale_linear"
    kind = fields.get(f"{name}.type", "linear" if factor in fields else "none")
    for own in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if fields.get(f"{name}.{own}", 1.0) != 1.0:
            raise UserError(f"{name}.{own} = {fields[f'{name}.{own}']!r:.60} is not supported; use another file")
    if kind == "linear":
        stretch = real(fields, factor)
        return None if stretch == 1.0 else {"rope_type": "linear", "factor": stretch}
    if kind == "yarn" and config.is_mla:
        return _yarn(fields, name)
    if kind != "none":
        raise UserError(f"{name}.type = {kind!r} is not supported; only none, linear, Llama 3's, DeepSeek's yarn are")
    return None


def _yarn(fields: Fields, name: str) -> dict[str, Any]:
    """DeepSeek's. The releases' mscale and mscale_all_dim are equal; the file has a tenth of them as multiplier."""
    scaling = {
        "rope_type": "yarn",
        "factor": real(fields, f"{name}.factor"),
        "original_max_position_embeddings": number(fields, f"{name}.original_context_length"),
        "beta_fast": real(fields, f"{name}.yarn_beta_fast", 32.0),
        "beta_slow": real(fields, f"{name}.yarn_beta_slow", 1.0),
    }
    if fields.get(f"{name}.yarn_log_multiplier"):
        mscale = float(f"{real(fields, f'{name}.yarn_log_multiplier') * 10:.6g}")
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _blocks(stored: Stored) -> int:
    return len({name.split(".")[1] for name in stored if name.startswith("blk.")})


def _is(name: str, tensor: str, part: str = "weight") -> bool:
    return name.startswith("blk.") and name.endswith(f".{tensor}.{part}")


def shape(stored: Stored, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a required tensor. Raises UserError if it is missing."""
    if name not in stored or len(stored[name].shape) != dimensions:
        raise UserError(f"tensor {name} is missing; fetch the file again")
    return stored[name].shape


@overload
def number(
    fields: Fields, name: str, default: int | EllipsisType = ..., least: int = 1, below: int = 1 << 31
) -> int: ...
@overload
def number(fields: Fields, name: str, default: None, least: int = 1, below: int = 1 << 31) -> int | None: ...
def number(
    fields: Fields, name: str, default: int | EllipsisType | None = ..., least: int = 1, below: int = 1 << 31
) -> int | None:
    """A whole number of the header. Raises UserError for another value, and where it is missing without a default."""
    value = fields.get(name, default)
    if value is ...:
        raise UserError(f"{name} is missing; fetch the file again")
    if value is None:
        return None
    if type(value) is not int or not least <= value < below:
        raise UserError(f"{name} = {value!r} must be a whole number from {least} to {below - 1}")
    return value


def real(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be a number above 0")
    return float(str(np.float32(value)))  # 1e-05, not the nearest fp32's digits
