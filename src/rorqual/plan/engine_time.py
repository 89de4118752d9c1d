"""Seconds of the engine on this machine's processor: prefill, and decode steps of a batch, as counts times costs.

The costs are measured: `rorqual plan --calibrate` times the engine with small models (engine/calibrate.py). Before that
they are those of an AMD EPYC (Zen 3), scaled by the speed of a large product.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from rorqual.model.config import ModelConfig
from rorqual.plan.cost import flops_by_layer, layer_parameters, parameters
from rorqual.plan.cpu_time import DEFAULT_PEAK, NOT_CALIBRATED, UNMEASURED
from rorqual.plan.fitting import Fitted
from rorqual.plan.hardware import matrix_peak
from rorqual.plan.measured_here import keep_entry, read_entry

MAX_PREFILL_TOKENS = 4096  # of a step of the engine
# Of the processor of cpu_time.DEFAULT, estimated from measurements on it while it was busy.
DEFAULT = {
    "steps": 8.0e-4, "layers": 4.0e-4, "mixtures": 2.0e-4, "experts": 6.0e-5, "weights": 1.0e-10, "products": 5.0e-12,
    "attention": 1.8e-10, "prompts": 5.0e-5, "within": 3.0e-11, "logits": 1.1e-9, "answers": 1.4e-4, "rounded": 1.0e-8,
}  # fmt: skip
DEFAULT_FP8_WEIGHTS = 2.0e-9


@dataclass(frozen=True)
class EngineCounts:
    """Of some work of the engine."""

    steps: float = 0.0
    layers: float = 0.0  # that run
    mixtures: float = 0.0  # of these, with experts
    experts: float = 0.0  # that run
    weights: float = 0.0  # read
    products: float = 0.0  # FLOPs with weights
    attention: float = 0.0  # FLOPs of decoding, with what is cached
    prompts: float = 0.0  # times the layers
    within: float = 0.0  # FLOPs of attention within prompts
    logits: float = 0.0  # numbers sampled from
    answers: float = 0.0  # begun and ended
    rounded: float = 0.0  # weights, to FP8 for the engine

    def __add__(self, other: "EngineCounts") -> "EngineCounts":
        return EngineCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class EngineCosts(Fitted):
    """Seconds of one of each of `EngineCounts`."""

    steps: float
    layers: float
    mixtures: float
    experts: float
    weights: float
    products: float
    attention: float
    prompts: float
    within: float
    logits: float
    answers: float
    rounded: float


def decode_counts(config: ModelConfig, batch: float, context: float) -> EngineCounts:
    """Of a step in which each of `batch` sequences, with so much context on average, gets a token."""
    return replace(
        _pass(config, batch, batch),
        attention=batch * context * decode_attention_flops(config),
        logits=batch * config.vocab_size,
    )


def prefill_counts(config: ModelConfig, prompts: float, length: float, answers: float) -> EngineCounts:
    """Of prompts of so many tokens each, and the first token of so many answers to all of them."""
    tokens, depth = prompts * length, config.num_hidden_layers
    passes = max(1.0, tokens / MAX_PREFILL_TOKENS)
    a_pass = _pass(config, tokens / passes, prompts / passes)
    counts = EngineCounts(**{name: passes * value for name, value in vars(a_pass).items()})
    return replace(
        counts,
        prompts=prompts * depth,
        within=prompts * length * length * sum(f.attention for f in flops_by_layer(config, 1)),
        logits=answers * config.vocab_size,
        answers=answers,
    )


def refresh_counts(config: ModelConfig) -> EngineCounts:
    """Of rounding a model's weights to FP8 for the engine: those of all layers, one matrix after another."""
    mixtures = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    head = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return EngineCounts(
        layers=config.num_hidden_layers,
        experts=mixtures * (config.n_routed_experts or 0),
        rounded=parameters(config)[0] - head,
    )


def _pass(config: ModelConfig, tokens: float, sampled: float) -> EngineCounts:
    """Of a forward pass without attention; logits of so many tokens are computed."""
    depth, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    mixtures = sum(config.is_moe_layer(i) for i in range(depth))
    total = parameters(config)[0] - (0 if config.tie_word_embeddings else head)
    experts = 0.0
    if mixtures:
        moe = config.moe
        share = moe.num_experts_per_tok / moe.n_routed_experts
        chosen = 1 - (1 - share) ** tokens  # of the experts, where each token takes any
        experts = mixtures * moe.n_routed_experts * chosen
        total -= mixtures * layer_parameters(config, True).routed * (1 - chosen)
    products = tokens * sum(f.products for f in flops_by_layer(config, 1)) + 2.0 * sampled * head
    return EngineCounts(1, depth, mixtures, experts, total, products)


def decode_attention_flops(config: ModelConfig) -> float:
    """Of a token of context, for a token that is decoded: latent attention in its absorbed form (V2 §2.1.2)."""
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    if config.is_mla:
        mla = config.mla
        return 2.0 * depth * heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
    return 4.0 * depth * heads * config.gqa.head_dim


def engine_costs_here(dtype: torch.dtype, fp8: bool = False) -> EngineCosts:
    """Those measured on this machine, else the defaults. fp8: of weights in FP8."""
    try:
        return TypeAdapter(EngineCosts).validate_python(read_entry(dtype, _entry(fp8)))
    except ValidationError:
        pass
    return EngineCosts(**expected_engine_costs(dtype, fp8), spread=UNMEASURED, source=NOT_CALIBRATED)


def expected_engine_costs(dtype: torch.dtype, fp8: bool = False) -> dict[str, float]:
    """The defaults, scaled by the speed of a large product."""
    costs = DEFAULT | ({"weights": DEFAULT_FP8_WEIGHTS} if fp8 else {})
    scale = DEFAULT_PEAK / matrix_peak(dtype)
    return {name: value * scale for name, value in costs.items()}


def keep_engine_costs(costs: EngineCosts, dtype: torch.dtype, fp8: bool = False) -> Path:
    """Raises UserError where it cannot be written."""
    return keep_entry(dtype, asdict(costs), _entry(fp8))


def _entry(fp8: bool) -> str:
    return "engine, FP8 weights" if fp8 else "engine"
