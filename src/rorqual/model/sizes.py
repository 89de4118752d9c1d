"""Sizes that only some models have. ModelConfig has them as optional fields of config.json; here none is optional."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MLASizes:
    """Multi-head latent attention (V2 §2.1)."""

    q_lora_rank: int | None  # None or 0: queries without a low rank
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class GQASizes:
    """Grouped-query attention (Ainslie et al. 2023)."""

    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class MoESizes:
    """Mixture of experts (DeepSeekMoE; V3 §2.1.2)."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
