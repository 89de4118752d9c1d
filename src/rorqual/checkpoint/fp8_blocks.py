"""DeepSeek's FP8 releases: E4M3 weights with one scale per block (V3 §3.3.2), expanded on loading, and written."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import UserError
from rorqual.strict_json import Json

SCALE_SUFFIX = "_scale_inv"  # the release's name for the scale by which a block is multiplied
BLOCK = 128, 128  # of what is written: rows and columns
MOST = 448.0  # the largest E4M3 number
DESCRIPTION = {  # of what is written, in config.json
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}


def block_size(raw: Mapping[str, Json], source: str) -> tuple[int, int]:
    """Rows and columns of a block, from a config.json's `quantization_config`; (128, 128) by default.

    Raises UserError for quantised releases that are not block-scaled FP8.
    """
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise UserError(f"{source}: quantization_config must be an object; restore the file")
    quantization = quantization or {}
    if (method := quantization.get("quant_method", "fp8")) != "fp8":
        raise UserError(f"{source}: quant_method {method!r} is not supported; get the unquantised release, or FP8")
    match quantization.get("weight_block_size", [128, 128]):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case block:
            raise UserError(f"{source}: weight_block_size = {block!r} must be two whole numbers, such as [128, 128]")


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight: one for each block; the last row and column of blocks may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def expand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [R, C] E4M3 and scale [⌈R/r⌉, ⌈C/c⌉] for blocks of r × c → weight·scale [R, C] in fp32."""
    rows = scale.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    return weight.float().mul_(rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]])


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, C] → E4M3 [R, C] and fp32 scales [⌈R/128⌉, ⌈C/128⌉], by which each block's largest number is 448."""
    R, C = weight.shape
    rows, columns = scale_shape((R, C), BLOCK)
    padded = F.pad(weight.float(), (0, columns * BLOCK[1] - C, 0, rows * BLOCK[0] - R))
    blocks = padded.view(rows, BLOCK[0], columns, BLOCK[1])
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / MOST, 1.0)
    numbers = (blocks / scale).clamp(-MOST, MOST).view_as(padded)[:R, :C]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scale.view(rows, columns)
