"""Channels evened out before numbers lose bits (SmoothQuant, Xiao et al. 2023, §4; AWQ, Lin et al. 2024, §3.2).

Some channels of what a norm gives are many times as large as most, and leave those little of a scale that they share.
A norm that divides a channel by s, with linears that multiply its weights by s, is the same network; with s the root of
the channel's mean size both sides lose less. Every s is a power of two: until something is rounded only exponents
change, and what the network says stays the same to the last bit.

Sizes are those that tokens drawn at random cause, so that no text is needed; what it does for SmolLM2 is in
docs/design-notes.md.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from rorqual.model import ModelConfig, Transformer
from rorqual.model.rope import rope_frequencies, rope_table
from rorqual.model.transformer import Layer

TOKENS = (4, 32)  # sequences and their length; twice as many did no better
LIMIT = 4  # s is at least 2⁻⁴ and at most 2⁴

# Norms of a layer, and who reads them, where there are such.
READERS = {
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
    """Multiply a network's parameters in place; what it says stays the same."""
    layers = (copy.deepcopy(layer).float() for layer in model.model.layers[: model.config.num_hidden_layers])
    factors = smoothing(model.config, model.model.embed_tokens, layers)
    for name, p in model.named_parameters():
        if name in factors:
            p.mul_(factors[name])


@torch.no_grad()
def smoothing(config: ModelConfig, embed: Callable[[Tensor], Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Parameters' names → what their last dimension is to be multiplied by: 1/s a norm's, s its readers'.

    `embed` maps tokens [B, T] to [B, T, D]; `layers` are the main network's in FP32, each used up before the next is
    asked for.
    """
    tokens = torch.randint(config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    x = embed(tokens).float()
    table = rope_table(torch.arange(TOKENS[1]).unsqueeze(0), *rope_frequencies(config), torch.float32)
    factors = {}
    for i, layer in enumerate(layers):
        names = {name.removesuffix(".weight"): name for name, _ in layer.named_parameters()}
        norms = [norm for norm in READERS if norm in names]
        sizes: dict[str, Tensor] = {}
        for norm in norms:
            layer.get_submodule(norm).register_forward_hook(partial(_measure, sizes, norm))
        x = layer(x, table, None, None, None)
        for norm in norms:
            s = _powers_of_two(sizes[norm])
            factors[f"model.layers.{i}.{names[norm]}"] = 1 / s
            factors |= {f"model.layers.{i}.{names[reader]}": s for reader in READERS[norm] if reader in names}
        del layer  # before the next one is read
    return factors


def _measure(sizes: dict[str, Tensor], norm: str, _: nn.Module, __: tuple[Tensor], y: Tensor) -> None:
    sizes[norm] = y.abs().flatten(0, -2).mean(0)


def _powers_of_two(sizes: Tensor) -> Tensor:
    exponents = (sizes / sizes.median()).sqrt().log2().round()
    return torch.where(exponents.isfinite(), exponents, 0).clamp(-LIMIT, LIMIT).exp2()  # a channel may be all zeros
