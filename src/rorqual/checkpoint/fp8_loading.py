"""Memory for weights that stay in FP8 (kernels/fp8_weight.py), in place of a network's parameters."""

import torch

from rorqual.checkpoint.fp8_blocks import SCALE_SUFFIX, is_rounded
from rorqual.checkpoint.model_reader import CheckpointReader
from rorqual.checkpoint.release_tensors import replace_weight
from rorqual.errors import UserError
from rorqual.kernels.block_scaled import block_starts
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.model.layers import Linear
from rorqual.model.moe import Experts
from rorqual.model.transformer import Transformer

EXPERT_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def allocate_fp8(release: CheckpointReader[Transformer], device: torch.device | str) -> None:
    """Give the outline's linears and experts FP8 weights: those that the release stores so, or, where it stores none,
    those that releases do. Embedding, head, routers and norms stay.

    Raises UserError for a layer whose experts are stored in different formats.
    """
    is_fp8 = any(name + SCALE_SUFFIX in release.stored for name in release.stored)
    for path, module in list(release.outline.named_modules()):
        if isinstance(module, Experts):
            stacks = {
                own: [[f"{path}.{e}.{part}.weight" for part in parts] for e in range(len(module.down_proj))]
                for own, parts in EXPERT_STACKS.items()
            }
        elif isinstance(module, Linear) and path != "lm_head":
            stacks = {"weight": [[f"{path}.weight"]]}
        else:
            continue
        for own, names in stacks.items():
            scales = {_scale_dtype(release, name, is_fp8) for parts in names for name in parts}
            if len(scales) > 1:
                raise UserError(
                    f"{release.stored[names[0][0]].path}: {path}.{own} is stored in FP8 in part only, or with scales "
                    "of different dtypes; load it without weights = fp8"
                )
            if dtype := scales.pop():
                replace_weight(module, own, _empty(release, names, dtype, device))


def _scale_dtype(release: CheckpointReader[Transformer], name: str, is_fp8: bool) -> torch.dtype | None:
    """The dtype of a weight's scales in memory; None: it is not kept in FP8."""
    if is_fp8:
        scale = release.stored.get(name + SCALE_SUFFIX)
        return scale and scale.dtype
    return torch.float32 if is_rounded(name) else None


def _empty(
    release: CheckpointReader[Transformer], names: list[list[str]], scales: torch.dtype, device: torch.device | str
) -> FP8Weight:
    """Uninitialised memory for the weights of experts, each of the same parts, whose blocks are their own."""
    shapes = [release.stored[name].shape for name in names[0]]
    rows, columns = sum(n for n, _ in shapes), shapes[0][1]
    blocks = [release.format.tiles(*shape) for shape in shapes]
    ends = torch.tensor([n for n, _ in shapes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return FP8Weight(
        torch.empty(len(names), rows, columns, dtype=torch.uint8, device=device),
        torch.empty(len(names), sum(b for b, _ in blocks), blocks[0][1], dtype=scales, device=device),
        release.format,
        block_starts(ends, release.format.tile[0]).to(device) if len(shapes) > 1 else None,
    )
