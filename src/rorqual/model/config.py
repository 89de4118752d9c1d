"""Model configuration, with the field names of Hugging Face's `config.json`.

Supported architectures: deepseek_v3 (V3, R1), deepseek_v2 (V2, V2-Lite), qwen2 and llama (the
R1-Distill family, SmolLM2).
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rorqual.errors import UserError
from rorqual.model.field_types import fits, is_positive, type_name
from rorqual.model.model_directory import check_directory, model_directory, read_json
from rorqual.model.sizes import GQASizes, MLASizes, MoESizes
from rorqual.model.unsupported import check_supported, read_rope

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
T = TypeVar("T")
MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE_FIELDS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
# Required fields of each rope_type, all above 0; and optional ones.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
# Required in a release with experts: defaults here and in the release's own code differ.
REQUIRED_WITH_EXPERTS = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one model. Raises UserError for invalid ones."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # grouped-query attention; None: one per head
    head_dim: int | None = None  # grouped-query attention; None: hidden_size / heads
    attention_bias: bool = False  # q, k, v (and o in llama); always on q, k, v in qwen2
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # V3 §4.2
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # yarn, llama3 or linear, as in the releases
    rope_interleave: bool = True  # pairs (0,1),(2,3)… as released by DeepSeek; False: two halves
    # Multi-head latent attention (V2 §2.1)
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # Mixture of experts (DeepSeekMoE; V3 §2.1.2)
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str | None = None  # sigmoid (V3) or softmax (V2)
    topk_method: str | None = None  # noaux_tc (V3), greedy or group_limited_greedy (V2)
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0  # depth of multi-token prediction (V3 §2.2)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(value, f.type):
                raise UserError(f"model.{f.name} = {value!r}: must be {type_name(f.type)}")
        if self.model_type not in ARCHITECTURES:
            raise UserError(
                f"model_type {self.model_type!r} is not supported; choose one of {', '.join(ARCHITECTURES)}"
            )
        deepseek = self.model_type.startswith("deepseek")
        v3 = self.model_type == "deepseek_v3"
        defaults: dict[str, Any] = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim if deepseek else self.hidden_size // max(1, self.num_attention_heads),
        }
        if deepseek:
            defaults |= {
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 0,
                "scoring_func": "sigmoid" if v3 else "softmax",
                "topk_method": "noaux_tc" if v3 else "greedy",
                "norm_topk_prob": v3,
            }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "moe_layer_freq"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        self._check_rope()
        if self.is_mla:
            missing = [n for n in MLA_FIELDS if not getattr(self, n)]
            if missing:
                raise UserError(f"model.{missing[0]} is missing: {self.model_type} needs {', '.join(MLA_FIELDS)}")
            rope_name = "qk_rope_head_dim"
        else:
            if self.num_attention_heads % self.gqa.num_key_value_heads:
                raise UserError(
                    f"model.num_key_value_heads = {self.num_key_value_heads}: must divide "
                    f"num_attention_heads = {self.num_attention_heads}"
                )
            rope_name = "head_dim"
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise UserError(f"model.{rope_name} = {self.rope_dim}: rotary embedding needs an even number ≥ 2")
        if self.n_routed_experts:
            self._check_experts()

    def _check_rope(self) -> None:
        if self.rope_theta <= 1:
            raise UserError(f"model.rope_theta = {self.rope_theta}: must be above 1")
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in ROPE_FIELDS:
            raise UserError(f"model.rope_scaling.rope_type = {kind!r}: must be one of {', '.join(ROPE_FIELDS)}")
        for name in ROPE_FIELDS[kind]:
            if not is_positive(scaling.get(name)):
                raise UserError(f"model.rope_scaling.{name} = {scaling.get(name)!r}: {kind} needs a number above 0")
        for name in ROPE_OPTIONS:
            if scaling.get(name) not in (None, 0) and not is_positive(scaling[name]):
                raise UserError(f"model.rope_scaling.{name} = {scaling[name]!r}: must be a number ≥ 0")
        if scaling.get("attention_factor") == 0:
            raise UserError("model.rope_scaling.attention_factor = 0: must be above 0")
        if not isinstance(scaling.get("truncate"), bool | None):
            raise UserError(f"model.rope_scaling.truncate = {scaling['truncate']!r}: must be true or false")
        if kind == "llama3" and scaling["low_freq_factor"] == scaling["high_freq_factor"]:
            raise UserError("model.rope_scaling.low_freq_factor: must differ from high_freq_factor")

    def _check_experts(self) -> None:
        missing = [n for n in MOE_FIELDS if not getattr(self, n)]
        if missing:
            raise UserError(f"model.{missing[0]} is missing: a mixture of experts needs {', '.join(MOE_FIELDS)}")
        if not self.is_mla:
            raise UserError(
                f"model.n_routed_experts = {self.n_routed_experts}: a model of type {self.model_type} has no experts"
            )
        moe = self.moe
        experts, groups, kept = moe.n_routed_experts, moe.n_group, moe.topk_group
        if groups < 1 or experts % groups:
            raise UserError(f"model.n_group = {groups}: must divide n_routed_experts = {experts}")
        if kept > groups:
            raise UserError(f"model.topk_group = {kept}: must be at most n_group = {groups}")
        if moe.num_experts_per_tok > kept * (experts // groups):
            raise UserError(
                f"model.num_experts_per_tok = {moe.num_experts_per_tok}: only {kept * (experts // groups)} experts are "
                f"within the {kept} groups kept"
            )
        if moe.scoring_func not in ("sigmoid", "softmax"):
            raise UserError(f"model.scoring_func = {moe.scoring_func!r}: must be 'sigmoid' or 'softmax'")
        if moe.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise UserError(
                f"model.topk_method = {moe.topk_method!r}: must be 'noaux_tc', 'greedy' or 'group_limited_greedy'"
            )

    @property
    def is_mla(self) -> bool:
        return self.model_type.startswith("deepseek")

    @property
    def mla(self) -> MLASizes:
        """Sizes of multi-head latent attention; only where `is_mla`, like `gqa` only elsewhere."""
        return MLASizes(
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=_given(self.kv_lora_rank),
            qk_nope_head_dim=_given(self.qk_nope_head_dim),
            qk_rope_head_dim=_given(self.qk_rope_head_dim),
            v_head_dim=_given(self.v_head_dim),
        )

    @property
    def gqa(self) -> GQASizes:
        return GQASizes(_given(self.num_key_value_heads), _given(self.head_dim))

    @property
    def moe(self) -> MoESizes:
        """Sizes of the mixture of experts; only where `n_routed_experts` is above 0."""
        return MoESizes(
            n_routed_experts=_given(self.n_routed_experts),
            n_shared_experts=_given(self.n_shared_experts),
            num_experts_per_tok=_given(self.num_experts_per_tok),
            moe_intermediate_size=_given(self.moe_intermediate_size),
            n_group=_given(self.n_group),
            topk_group=_given(self.topk_group),
            scoring_func=_given(self.scoring_func),
            topk_method=_given(self.topk_method),
            norm_topk_prob=_given(self.norm_topk_prob),
            routed_scaling_factor=self.routed_scaling_factor,
        )

    @property
    def rope_dim(self) -> int:
        """Rotary width of a head."""
        return self.mla.qk_rope_head_dim if self.is_mla else self.gqa.head_dim

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Of a head's queries and values in training (`attend`)."""
        if not self.is_mla:
            return self.gqa.head_dim, self.gqa.head_dim
        return self.mla.qk_head_dim, max(self.mla.qk_head_dim, self.mla.v_head_dim)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has experts; layers past the last are multi-token modules (always experts)."""
        if not self.n_routed_experts:
            return False
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def replace(self, **changes: Any) -> "ModelConfig":
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face config. null counts as not given; keys without influence on the network are ignored.
        Raises UserError, which names `source`, for keys whose value would need another network than this one.
        """
        raw_with_nulls, raw = raw, {name: value for name, value in raw.items() if value is not None}
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise UserError(
                f"{source}: model_type {model_type!r} is not supported; choose one of {', '.join(ARCHITECTURES)}"
            )
        raw |= read_rope(raw, source)
        if model_type in ("qwen2",):
            raw["attention_bias"] = True
        if not model_type.startswith("deepseek"):
            raw.setdefault("rope_interleave", False)
        required = [n for n in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                "num_attention_heads") if n not in raw]  # fmt: skip
        if required:
            raise UserError(f"{source}: {required[0]} is missing")
        raw.setdefault("initializer_range", 0.02)
        names = {f.name for f in fields(cls)}
        # Some releases write -1 for a token that does not exist.
        given = {k: v for k, v in raw.items() if k in names and not (k.endswith("_token_id") and v == -1)}
        try:
            config = cls(**given)
        except UserError as e:
            raise UserError(f"{source}: {e}") from None
        check_supported(raw_with_nulls, config.num_hidden_layers, config.max_position_embeddings, source)
        return config

    @classmethod
    def load(cls, directory: str | Path) -> "ModelConfig":
        """Read the config.json of a model directory, or of the model in a run's folder. Raises UserError."""
        check_directory(directory)
        path = model_directory(directory) / "config.json"
        raw = read_json(path)
        config = cls.from_dict(raw, str(path))
        if missing := [n for n in REQUIRED_WITH_EXPERTS if config.n_routed_experts and raw.get(n) is None]:
            raise UserError(f"{path}: {missing[0]} is missing, which a mixture of experts needs; restore the file")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this network."""
        out: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]]}
        out |= {k: v for k, v in asdict(self).items() if v is not None}
        out |= {"hidden_act": "silu", "use_cache": True}
        if self.is_mla:
            out["q_lora_rank"] = self.q_lora_rank  # null is meaningful: queries without a low rank
        else:
            out.pop("rope_interleave")
        if not self.n_routed_experts:
            for name in ("n_shared_experts", "n_group", "topk_group", "scoring_func", "topk_method"):
                out.pop(name, None)
        return out


def _given(value: T | None) -> T:
    """A field that `_check` has found, or `__post_init__` has set."""
    assert value is not None
    return value
