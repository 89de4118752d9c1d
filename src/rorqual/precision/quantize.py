"""Int4 and int8 weights for inference on a CPU: rounding, and conversion of a model.

N out, K in, G groups of 32 inputs.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.checkpoint.model_reader import open_release
from rorqual.checkpoint.release_tensors import EMBEDDING, replace_weight
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import GROUP, PANEL, QuantizedWeight, dequantize, gather, pack
from rorqual.model import Transformer
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear
from rorqual.model.moe import Experts
from rorqual.model.transformer import Layer
from rorqual.precision.smoothquant import smooth, smoothing
from rorqual.process_tuning import release_memory
from rorqual.shapes import Float32

Bits = Literal["int4", "int8"]
SCALE_CANDIDATES = 16  # for a group of int4 weights
SLICE_WEIGHTS = 1 << 16  # rounded at a time


def round_int8(weight: Tensor) -> QuantizedWeight:
    """weight [E, N, K] → int8 with a scale for each output (Dettmers et al. 2022, row-wise)."""
    weight = weight.float()
    scales = weight.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scales > 0, weight / scales, 0.0).round() + 128
    return pack("int8", q.to(torch.uint8), scales)


def round_int4(weight: Tensor) -> QuantizedWeight:
    """weight [E, N, K] → int4 with a scale for 32 inputs, the candidate of least squared error."""
    E, N, K = weight.shape
    groups = F.pad(weight.float(), (0, -K % GROUP)).view(E, N, -1, GROUP)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign: q − 8 goes from −8 to 7
    # At a divisor of 8 the largest weight is exact; above, it is clipped.
    scales = (extreme / -torch.linspace(7.0, 9.5, SCALE_CANDIDATES)).half().float()
    best = torch.empty_like(extreme)
    if cpu.usable(groups):
        cpu.call("best_scale", torch.float32, groups, scales, best.numel(), SCALE_CANDIDATES, best)
    else:
        best = best_scale_reference(groups, scales)
    q = _nearest(groups, best).to(torch.uint8).view(E, N, -1)[..., :K]
    return pack("int4", q, best.squeeze(-1))


def best_scale_reference(
    groups: Float32[Tensor, "*groups 32"], scales: Float32[Tensor, "*groups candidates"]
) -> Float32[Tensor, "*groups 1"]:
    best = torch.zeros_like(groups[..., :1])
    least = torch.full_like(best, float("inf"))
    for scale in scales.split(1, dim=-1):
        error = ((_nearest(groups, scale) - 8) * scale - groups).square().sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _nearest(groups: Tensor, scale: Tensor) -> Tensor:
    return (torch.where(scale != 0, groups / scale, 0.0) + 8).round().clamp(0, 15)


ROUNDINGS: dict[Bits, Callable[[Tensor], QuantizedWeight]] = {"int4": round_int4, "int8": round_int8}


class QuantizedEmbedding(nn.Module):
    """An embedding with quantised weights; rows are dequantised on lookup."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows = dequantize(self.weight, rows=tokens.flatten())
        return rows.to(self.weight.dtype).view(*tokens.shape, -1)


@torch.no_grad()
def convert(model: Transformer, bits: Bits) -> Transformer:
    """Quantise the weights of a model in place: linears, experts, embedding and head.

    Not quantised: norms, routers, and latent attention's up-projections, which decode absorbs into query and output (V2
    §2.1.2). Raises UserError for a model that is quantised already or not on a CPU.
    """
    if isinstance(model.head_weight, QuantizedWeight):
        raise UserError("the model's weights are quantised already")
    if model.head_weight.device.type != "cpu":
        raise UserError("quantised weights are for a CPU; load the model there")
    smooth(model)
    for module in list(model.modules()):
        if packable(module):
            pack_module(module, bits)
    replace_embedding(model, quantized(model.model.embed_tokens.weight, bits))
    return model


@torch.no_grad()
def load_converted(path: Path, bits: Bits, dtype: torch.dtype) -> Transformer:
    """Load a directory in `dtype` and quantise it as `convert` does, a few rows at a time.

    Raises UserError as load_model does.
    """
    release = open_release(path)
    model = release.outline

    def embed(tokens: Tensor) -> Tensor:
        rows = [release.rows(EMBEDDING, t, t + 1) for t in tokens.flatten().tolist()]
        return torch.cat(rows).view(*tokens.shape, -1)

    def layers() -> Iterator[Layer]:
        for i in range(model.config.num_hidden_layers):
            release_memory()  # of the previous layer
            yield release.layer(i)

    factors = smoothing(model.config, embed, layers())

    def smoothed(name: str, numbers: Tensor) -> Tensor:
        numbers = numbers.to(dtype)
        return numbers * factors[name].to(dtype) if name in factors else numbers

    def rounded(parameter: str, names: list[list[str]]) -> QuantizedWeight:
        """Weights [E, N, K]; an expert's outputs are concatenated from several tensors."""

        def rows(e: int, first: int, last: int) -> Tensor:
            parts = []
            for name in names[e]:
                n = release.stored[name].shape[0]
                if first < n and last > 0:
                    parts.append(smoothed(parameter, release.rows(name, max(0, first), min(n, last))))
                first, last = first - n, last - n
            return torch.cat(parts)

        shapes = [release.stored[name].shape for name in names[0]]
        packed = round_in_slices(rows, (len(names), sum(n for n, _ in shapes), shapes[0][1]), bits)
        packed.dtype = dtype
        return packed

    for name, module in list(model.named_modules()):
        release_memory()  # of the previous module
        if isinstance(module, Experts):
            for own, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                names = [[f"{name}.{e}.{part}.weight" for part in parts] for e in range(len(getattr(module, own)))]
                replace_weight(module, own, rounded(f"{name}.{own}", names))
        elif isinstance(module, nn.Embedding):
            replace_embedding(model, rounded(EMBEDDING, [[EMBEDDING]]))
        else:
            if packable(module):
                replace_weight(module, "weight", rounded(f"{name}.weight", [[f"{name}.weight"]]))
            for own, _ in list(module.named_parameters(recurse=False)):
                setattr(module, own, nn.Parameter(smoothed(f"{name}.{own}", release.rows(f"{name}.{own}"))))
            for own, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, own, release.rows(f"{name}.{own}").to(buffer.dtype))
    return model


def packable(module: nn.Module) -> bool:
    """Whether a module's weights are quantised."""
    return isinstance(module, Experts) or (isinstance(module, Linear) and not isinstance(module, UpProjection))


def pack_module(module: nn.Module, bits: Bits) -> None:
    """Replace the parameters of a linear or of experts by quantised weights."""
    for name in ("gate_up_proj", "down_proj") if isinstance(module, Experts) else ("weight",):
        replace_weight(module, name, quantized(getattr(module, name), bits))


def replace_embedding(model: Transformer, weight: QuantizedWeight) -> None:
    model.set_submodule("model.embed_tokens", QuantizedEmbedding(weight))


def quantized(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """A weight [N, K], or experts' [E, N, K]."""
    weight = weight.detach().view(-1, *weight.shape[-2:])
    E, N, K = weight.shape
    packed = round_in_slices(lambda e, first, last: weight[e, first:last], (E, N, K), bits)
    packed.dtype = weight.dtype
    return packed


def round_in_slices(
    rows: Callable[[int, int, int], Tensor], shape: tuple[int, int, int], bits: Bits
) -> QuantizedWeight:
    """Quantise weights [E, N, K]; `rows(e, first, last)` gives rows of an expert. In slices, since rounding needs
    several times the memory of its input."""
    E, N, K = shape
    step = max(1, SLICE_WEIGHTS // K // PANEL) * PANEL
    places = itertools.product(range(E), range(0, N, step))
    return gather((ROUNDINGS[bits](rows(e, at, min(at + step, N)).unsqueeze(0)) for e, at in places), E, N)
