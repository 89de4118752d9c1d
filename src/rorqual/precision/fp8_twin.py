"""A copy of a model that is trained, with its linears in FP8: what rollouts are sampled from."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from rorqual.checkpoint.fp8_blocks import is_rounded
from rorqual.checkpoint.release_tensors import meta_model, replace_weight
from rorqual.kernels.block_scaled import block_starts, quantize
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.kernels.number_formats import FP8_BLOCK
from rorqual.model import ModelConfig, Transformer
from rorqual.model.layers import Linear
from rorqual.model.moe import Experts

HALVES = {"gate_up_proj": 2}  # of an expert's weights; they share no block


class FP8Twin:
    """`model` has FP8 weights in 128×128 blocks where a release has them; all other tensors are the original's own."""

    def __init__(self, original: Transformer) -> None:
        tensors = (*original.parameters(), *original.buffers())
        self.model = copy.deepcopy(original, {id(t): t for t in tensors}).eval()
        self._rounded = [(weight, _empty(name, weight)) for _, name, weight in _weights(original)]
        for (path, name, _), (_, rounded) in zip(_weights(original), self._rounded, strict=True):
            replace_weight(self.model.get_submodule(path), name, rounded)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the original's weights as they are now."""
        for weight, rounded in self._rounded:
            parts = len(rounded.codes) if rounded.starts is None else 2 * len(rounded.codes)
            codes, scales = rounded.codes.view(parts, -1, rounded.codes.shape[-1]), rounded.scales
            scales = scales.view(parts, -1, scales.shape[-1])
            for part, own_codes, own_scales in zip(weight.view_as(codes), codes, scales, strict=True):
                new_codes, new_scales = quantize(part, rounded.format).kept
                own_codes.copy_(new_codes)
                own_scales.copy_(new_scales)


def twin_bytes(config: ModelConfig) -> int:
    """What the twin of a model of these sizes takes beside it."""
    rounded = (_empty(name, weight) for _, name, weight in _weights(meta_model(config)))
    return sum(weight.codes.nbytes + weight.scales.nbytes for weight in rounded)


def rounded_names(model: Transformer) -> set[str]:
    """The parameters that the twin of `model` has in FP8."""
    return {f"{path}.{name}" for path, name, _ in _weights(model)}


def _weights(model: Transformer) -> Iterator[tuple[str, str, Tensor]]:
    """Module, parameter and weight of what is rounded."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield path, "gate_up_proj", module.gate_up_proj
            yield path, "down_proj", module.down_proj
        elif isinstance(module, Linear) and is_rounded(f"{path}.weight"):
            yield path, "weight", module.weight


def _empty(name: str, weight: Tensor) -> FP8Weight:
    """Uninitialised FP8 memory for a parameter."""
    halves = HALVES.get(name, 1)
    E, N, K = weight.shape if weight.ndim == 3 else (1, *weight.shape)
    rows, columns = FP8_BLOCK.tiles(N // halves, K)
    ends = torch.arange(1, halves + 1, dtype=torch.int32) * (N // halves)
    return FP8Weight(
        torch.empty(E, N, K, dtype=torch.uint8, device=weight.device),
        torch.empty(E, halves * rows, columns, device=weight.device),
        FP8_BLOCK,
        block_starts(ends, FP8_BLOCK.tile[0]).to(weight.device) if halves > 1 else None,
    )
