"""Keys of config.json that would need another network than this one.

A key listed here is refused unless its value changes nothing: weights give the logits of the release's own code, or an
error.
"""

from collections.abc import Mapping

from rorqual.errors import UserError
from rorqual.strict_json import Json

SILU = ("silu", "swish")  # two names of one function
# Key → the values supported. null, or no such key, always is.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "hidden_act": SILU,
    "hidden_activation": SILU,
    "activation_function": SILU,
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "use_qkv_norm": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "router_logit_softcapping": (),
    "logit_softcap": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attention_scale": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "swiglu_limit": (),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_percentage": (1,),
    "rope_local_base_freq": (),
    "index_topk": (),
}
GROUPED: dict[str, tuple[Json, ...]] = {
    "rope_interleave": (False,),  # llama and qwen2 rotate halves of a head
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
}
# Keys that the code of a model type (transformers', DeepSeek's) ignores, or values that it does not support.
BY_MODEL_TYPE: dict[str, dict[str, tuple[Json, ...]]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "deepseek_v2": {
        "rope_interleave": (True,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}


def check_supported(raw: Mapping[str, Json], layers: int, context: int, source: str) -> None:
    """Raises UserError for an unsupported key. raw: a config.json; layers: their number; context: its tokens."""
    for name, values in (NEUTRAL | BY_MODEL_TYPE[str(raw["model_type"])]).items():
        if raw.get(name) is not None and not any(raw[name] == value for value in values):
            only = f"; only {' or '.join(map(repr, values))} is" if values else ""
            raise UserError(f"{source}: {name} = {raw[name]!r:.60} is not supported{only}; use another release")
    _check_sliding_window(raw, layers, context, source)


def _check_sliding_window(raw: Mapping[str, Json], layers: int, context: int, source: str) -> None:
    """Raises UserError if some layer has a sliding window shorter than the context."""
    qwen2 = raw["model_type"] == "qwen2"  # defaults of transformers' Qwen2Config
    given = raw.get("layer_types") or []
    kinds = [kind for kind in given if isinstance(kind, str)] if isinstance(given, list) else []
    if kinds != given:
        raise UserError(f"{source}: layer_types = {given!r:.60} must be a list of strings")
    if others := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{source}: layer_types holds {others[0]!r}, which is not supported; use another release")
    window = _whole_number(raw, "sliding_window", source, default=4096 if qwen2 else None)
    first = _whole_number(raw, "max_window_layers", source)
    enabled = raw.get("use_sliding_window")
    if not isinstance(enabled, bool | None):
        raise UserError(f"{source}: use_sliding_window = {enabled!r:.60} must be true or false")
    enabled = not qwen2 if enabled is None else enabled
    first = (28 if qwen2 else 0) if first is None else first
    slides = "sliding_attention" in kinds if kinds else window is not None and enabled and first < layers
    if slides and not (window is not None and window >= context):
        raise UserError(
            f"{source}: sliding_window = {window!r} (layer_types, use_sliding_window) is not supported, and is "
            f"shorter than max_position_embeddings = {context}; lower that to the window, or use another release"
        )


def _whole_number(raw: Mapping[str, Json], name: str, source: str, default: int | None = None) -> int | None:
    value = raw.get(name, default)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UserError(f"{source}: {name} = {value!r:.60} must be a whole number or null")


def read_rope(raw: Mapping[str, Json], source: str) -> dict[str, Json]:
    """rope_theta and rope_scaling (None: no scaling) from either form that releases use.

    transformers 5 has rope_parameters; older releases have rope_theta and rope_scaling. Raises UserError if both are
    given and differ, and for scaling of a part of the layers or of a head.
    """
    found = [_rope(raw, name, source) for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    if len(found) == 2 and any(found[0][key] != found[1].get(key) for key in found[0]):
        raise UserError(f"{source}: rope_scaling and rope_parameters differ; keep the correct one")
    rope = found[-1] if found else {}
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    scaling: Json = rope if rope.get("rope_type", "default") != "default" else None
    found_rope: dict[str, Json] = {"rope_scaling": scaling}
    return found_rope if theta is None else found_rope | {"rope_theta": theta}


def _rope(raw: Mapping[str, Json], name: str, source: str) -> dict[str, Json]:
    given = raw[name]
    if not isinstance(given, dict):
        raise UserError(f"{source}: {name} = {given!r:.60} must be an object or null")
    rope: dict[str, Json] = {key: value for key, value in given.items() if value is not None}
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(
            f"{source}: {name}.{nested[0]} is for a part of the layers, which is not supported; use another release"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{source}: {name}.partial_rotary_factor = {rope['partial_rotary_factor']!r:.60} is not supported, "
            "only 1 is; use another release"
        )
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    rope.pop("partial_rotary_factor", None)
    if rope["rope_type"] in ("llama3", "yarn") and "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]  # as in transformers
    return rope
