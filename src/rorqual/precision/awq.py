"""AWQ (Lin et al. 2024, 2306.00978, §3.2): scale up the input channels that matter before rounding.

A linear's inputs are divided by s and its columns multiplied by s; the division is folded into what makes the inputs: a
norm, or the linear before. s = magnitude^α, α of a grid by the error of the outputs on calibration inputs. As in
smoothquant.py every s is a power of two, so that the unquantised network stays the same to the last bit in any dtype,
its router included; magnitudes are root mean squares. Clipping is the rounding's own (quantize.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rorqual.kernels.linear import linear
from rorqual.kernels.swiglu import swiglu_joined
from rorqual.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.model.layers import SwiGLU
from rorqual.model.moe import MixtureOfExperts
from rorqual.model.transformer import Block
from rorqual.precision.calibrate import LinearInputs
from rorqual.precision.integer_rounding import dequantized, output_error, round_nearest
from rorqual.precision.quantize import Bits
from rorqual.precision.smoothquant import CONSUMERS, powers_of_two
from rorqual.shapes import Float32, Int

ALPHAS = tuple(i / 10 for i in range(11))


def fold(block: Block, inputs: LinearInputs, bits: Bits, enough: int) -> None:
    """Choose and fold the scales of a block in FP32, in place, and change `inputs` with it.

    enough: rows that an expert must have received for scales of its own.
    """
    _fold_values(block.self_attn, inputs.gram("self_attn.o_proj"), bits)
    for name, module in block.named_modules():
        if isinstance(module, SwiGLU):
            gram = inputs.gram(f"{name}.down_proj")
            s = search([module.down_proj.weight], gram, bits)
            module.up_proj.weight.div_(s.unsqueeze(1))
            if module.up_proj.bias is not None:
                module.up_proj.bias.div_(s)
            _multiply(module.down_proj.weight, s, gram)
        elif isinstance(module, MixtureOfExperts):
            _fold_experts(module, name, inputs, bits, enough)
    for norm, consumers in CONSUMERS.items():
        _fold_norm(block, norm, consumers, inputs, bits)


def search(
    weights: Sequence[Float32[Tensor, "_ K"]],
    gram: Float32[Tensor, "K K"],
    bits: Bits,
    source: Int[Tensor, " K"] | None = None,
) -> Float32[Tensor, " C"]:
    """The scales of least squared output error for weights with the same inputs, whose XᵀX is `gram`.

    source: the channel that each input is made from, where several must have one scale; by default its own.
    """
    source = torch.arange(len(gram)) if source is None else source
    magnitudes = (torch.bincount(source, gram.diagonal()) / torch.bincount(source)).sqrt().float()
    best, least, tried = torch.ones_like(magnitudes), float("inf"), list[Tensor]()
    for alpha in ALPHAS:
        s = powers_of_two(magnitudes, alpha)
        if any(torch.equal(s, other) for other in tried):
            continue
        tried.append(s)
        own = s[source]
        error = sum(output_error(dequantized(*round_nearest(w * own, bits), bits) / own - w, gram) for w in weights)
        if error < least:
            best, least = s, error
    return best


def _fold_values(attention: nn.Module, gram: Tensor, bits: Bits) -> None:
    """The output projection's scales, into the values; the heads of a group share theirs."""
    if isinstance(attention, GroupedQueryAttention):
        H, G, W = attention.H, attention.G, attention.W
        source = torch.arange(G * W).view(G, 1, W).expand(G, H // G, W).flatten()
        s = search([attention.o_proj.weight], gram, bits, source)
        attention.v_proj.weight.div_(s.unsqueeze(1))
        if attention.v_proj.bias is not None:
            attention.v_proj.bias.div_(s)
        _multiply(attention.o_proj.weight, s[source], gram)
    elif isinstance(attention, MultiHeadLatentAttention):
        s = search([attention.o_proj.weight], gram, bits)
        heads = attention.kv_b_proj.weight.view(attention.H, attention.N + attention.V, attention.C)
        heads[:, attention.N :].div_(s.view(attention.H, attention.V, 1))
        _multiply(attention.o_proj.weight, s, gram)


def _fold_experts(module: MixtureOfExperts, name: str, inputs: LinearInputs, bits: Bits, enough: int) -> None:
    """Every expert's down projection's scales, into its up projection."""
    for e, down in enumerate(module.experts.down_proj):
        rows = inputs.rows_of(name, e)
        if len(rows) < enough:
            continue
        gate_up = module.experts.gate_up_proj[e]
        h = swiglu_joined(linear(rows, gate_up))
        s = search([down], h.T @ h, bits)
        gate_up[len(gate_up) // 2 :].div_(s.unsqueeze(1))
        down.mul_(s)


def _fold_norm(block: Block, norm: str, consumers: Sequence[str], inputs: LinearInputs, bits: Bits) -> None:
    """The scales of the linears that read a norm, into the norm; a router that reads it too is scaled with them."""
    parameters = dict(block.named_parameters())
    if f"{norm}.weight" not in parameters:
        return
    readers = {name: p for c in consumers for name in (c, f"{c}.weight") if (p := parameters.get(name)) is not None}
    linears = [name.removesuffix(".weight") for name in readers if name.removesuffix(".weight") in inputs.same_as]
    routed = inputs.routed.get("mlp") if norm == "post_attention_layernorm" else None
    gram = inputs.gram(linears[0]) if routed is None else routed.T @ routed
    rounded = [w for name, p in readers.items() if name != "mlp.gate.weight" for w in (p if p.ndim == 3 else (p,))]
    s = search(rounded, gram, bits)
    parameters[f"{norm}.weight"].div_(s)
    for p in readers.values():
        p.mul_(s)
    for shared in {inputs.same_as[name] for name in linears}:
        inputs.grams[shared].div_(torch.outer(s, s))
    if routed is not None:
        routed.div_(s)


def _multiply(weight: Tensor, s: Tensor, gram: Tensor) -> None:
    """Scale a linear's columns, and the XᵀX of its inputs, which are divided."""
    weight.mul_(s)
    gram.div_(torch.outer(s, s))
