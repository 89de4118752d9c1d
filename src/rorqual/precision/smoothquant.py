"""SmoothQuant (Xiao et al. 2023, §4; AWQ, Lin et al. 2024, §3.2): scale outlier channels down before quantisation.

Some channels of a norm's output are many times larger than most, and take the range of a shared scale. Dividing the
norm's weight by s and multiplying the following linears' by s leaves the model unchanged; with s the square root of the
channel's mean magnitude, activations and weights both lose less. Every s is a power of two, so that only exponents
change, and the unquantised model's output is the same to the last bit.

Magnitudes are calibrated with random tokens, so no text is needed; results for SmolLM2 are in docs/design-notes.md.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from rorqual.model import ModelConfig, Transformer
from rorqual.model.rope import rope_frequencies, rope_table
from rorqual.model.transformer import Layer

CALIBRATION_SHAPE = (4, 32)  # sequences, tokens; twice as many did no better
MAX_EXPONENT = 4  # s is at least 2⁻⁴ and at most 2⁴

# A layer's norms → the linears that take their output, where present.
CONSUMERS = {
    "input_layernorm": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
    ),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
    "post_attention_layernorm": (
        "mlp.gate_proj", "mlp.up_proj", "mlp.gate", "mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
}  # fmt: skip


@torch.no_grad()
def smooth(model: Transformer) -> None:
    """Smooth a model's parameters in place; its output stays the same."""
    layers = (copy.deepcopy(layer).float() for layer in model.layers)
    factors = smoothing(model.config, model.model.embed_tokens, layers)
    for name, p in model.named_parameters():
        if name in factors:
            p.mul_(factors[name])


@torch.no_grad()
def smoothing(config: ModelConfig, embed: Callable[[Tensor], Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Parameter name → the factor of its last dimension: 1/s for a norm, s for the linears after it.

    `embed` maps tokens [B, T] to [B, T, D]; `layers`: the main model's in FP32, of which one is in memory at a time.
    """
    tokens = torch.randint(config.vocab_size, CALIBRATION_SHAPE, generator=torch.Generator().manual_seed(0))
    x = embed(tokens).float()
    table = rope_table(torch.arange(CALIBRATION_SHAPE[1]).unsqueeze(0), *rope_frequencies(config), torch.float32)
    factors = {}
    for i, layer in enumerate(layers):
        names = {name.removesuffix(".weight"): name for name, _ in layer.named_parameters()}
        norms = [norm for norm in CONSUMERS if norm in names]
        magnitudes: dict[str, Tensor] = {}
        for norm in norms:
            layer.get_submodule(norm).register_forward_hook(partial(_measure, magnitudes, norm))
        x = layer(x, table, None, None, None)
        for norm in norms:
            s = powers_of_two(magnitudes[norm])
            factors[f"model.layers.{i}.{names[norm]}"] = 1 / s
            factors |= {f"model.layers.{i}.{names[consumer]}": s for consumer in CONSUMERS[norm] if consumer in names}
        del layer  # before the next one is read
    return factors


def _measure(magnitudes: dict[str, Tensor], norm: str, _: nn.Module, __: tuple[Tensor], y: Tensor) -> None:
    magnitudes[norm] = y.abs().flatten(0, -2).mean(0)


def powers_of_two(magnitudes: Tensor, alpha: float = 0.5) -> Tensor:
    """(magnitude / median)^alpha of every channel, rounded to powers of two."""
    exponents = ((magnitudes / magnitudes.median()).log2() * alpha).round()
    finite = torch.where(exponents.isfinite(), exponents, 0)  # a channel may be all zeros
    return finite.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp2()
