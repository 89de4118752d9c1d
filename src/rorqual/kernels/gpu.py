"""Which GPU kernel rounds a matrix and multiplies two rounded ones, if any.

| product of | on | by |
|---|---|---|
| FP8 1×128 and 1×128 or 128×128, one matrix, whole tiles | Hopper (9.0), CUDA ≥ 12.9 | PyTorch's `scaled_mm` |
| MXFP8, one matrix, whole tiles | Blackwell (10.0) | PyTorch's `scaled_mm` |
| E4M3 with tiles 128 or 32 wide, also of experts and of any shape | from 8.9 on, with Triton | kernels/triton |
| all else: 4 and 12 bits, one scale a tensor | | the product of the FP32 values |

PyTorch's `scaled_grouped_mm` has no tiles of 128, and wants experts' rows in multiples.
"""

import functools
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.number_formats import E4M3, NumberFormat
from rorqual.shapes import Float32, UInt8

Kind = Literal["output", "input gradient", "weight gradient"]
Way = Literal["torch", "triton", "reference"]
WORD = 16  # matrix sizes are multiples of this in scaled_mm


class Chip(NamedTuple):
    """What decides about kernels."""

    capability: tuple[int, int]
    cuda: tuple[int, int]
    triton: bool


class Factor(NamedTuple):
    """Of a rounded matrix, what decides about kernels. every: as in BlockScaled."""

    format: NumberFormat
    shape: tuple[int, int]
    every: int = 0


NONE = Chip((0, 0), (0, 0), False)  # no GPU of NVIDIA's


def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return NONE
    return _chip(torch.cuda.current_device() if device.index is None else device.index)  # pyright: ignore[reportUnnecessaryComparison]


@functools.cache
def _chip(index: int) -> Chip:
    if torch.version.hip or not torch.version.cuda:
        return NONE
    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    return Chip(torch.cuda.get_device_capability(index), (major, minor), has_triton())


@functools.cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def quantizes(x: Tensor, format: NumberFormat) -> bool:
    """Whether Triton's kernel rounds x."""
    if not chip(x.device).triton:
        return False
    from rorqual.kernels.triton.quantize import supports

    return supports(format)


def way(kind: Kind, left: Factor, right: Factor, experts: int, chip: Chip) -> Way:
    """What multiplies the two: x and weight, grad and weight, or grad and x."""
    tiles = _contracted(kind, left, right)
    if tiles is None or chip.capability < (8, 9):
        return "reference"
    if experts == 1 and _fits_torch(kind, left, right, tiles, chip):
        return "torch"
    return "triton" if chip.triton else "reference"


def _contracted(kind: Kind, left: Factor, right: Factor) -> int | None:
    """Width of the tiles along the contracted dimension, where both factors have the same ones; else None."""
    a, b = left.format, right.format
    if a.element != E4M3 or b.element != E4M3:
        return None
    (across, along) = a.tile[::-1] if kind == "weight gradient" else a.tile
    other = b.tile[1] if kind == "output" else b.tile[0]
    if across != 1 or along != other or along not in (32, 128) or 0 in b.tile:
        return None
    if kind == "weight gradient" and b.tile[1] != 1:
        return None
    if kind == "input gradient" and right.every % along and right.every != left.shape[1]:
        return None  # blocks of stacked weights that start within a tile of the gradient
    return along


def _fits_torch(kind: Kind, left: Factor, right: Factor, tile: int, chip: Chip) -> bool:
    hopper = chip.capability == (9, 0) and chip.cuda >= (12, 9) and tile == 128
    powers = left.format.scale == right.format.scale == "power of two"
    blackwell = chip.capability == (10, 0) and tile == 32 and powers and 1 in right.format.tile
    contracted = left.shape[0 if kind == "weight gradient" else 1]
    whole = contracted % tile == 0 and not any(n % WORD for n in (*left.shape, *right.shape))
    blocks = right.format.tile == (128, 128)
    outer = right.shape[0 if kind == "output" else 1]
    cut = right.every % 128 != 0 or (blocks and outer % 128 != 0)
    return (hopper or blackwell) and whole and not cut


# -- PyTorch's product


def scaled_mm(
    kind: Kind,
    left: tuple[UInt8[Tensor, "R C"], Float32[Tensor, "b t"]],
    right: tuple[UInt8[Tensor, "R2 C2"], Float32[Tensor, "b2 t2"]],
    format: NumberFormat,
    dtype: torch.dtype,
) -> Tensor:
    """The product by `torch.nn.functional.scaled_mm`, of codes and scales. `format`: of the right factor.

    It takes both factors with the contracted dimension side by side in memory; what lies otherwise is copied.
    """
    (a, a_scales), (b, b_scales) = left, right
    if kind == "weight gradient":
        a, a_scales = a.T, a_scales.T
    if kind != "output":  # [N, K] with K contracted
        b, b_scales = b.T, b_scales.T
    a, b = (x.contiguous().view(torch.float8_e4m3fn) for x in (a, b))
    if 32 in format.tile:
        kinds = (F.ScalingType.BlockWise1x32,) * 2
        swizzled = F.SwizzleType.SWIZZLE_32_4_4
        scales = swizzle(a_scales), swizzle(b_scales)
        return F.scaled_mm(
            a, b.T, scales[0], kinds[0], scales[1], kinds[1], swizzle_a=swizzled, swizzle_b=swizzled,
            output_dtype=dtype,
        )  # fmt: skip
    blocks = format.tile == (128, 128)
    b_kind = F.ScalingType.BlockWise128x128 if blocks else F.ScalingType.BlockWise1x128
    b_scales = block_scales(b_scales) if blocks else _by_columns(b_scales)
    return F.scaled_mm(
        a, b.T, _by_columns(a_scales), F.ScalingType.BlockWise1x128, b_scales, b_kind, output_dtype=dtype
    )  # fmt: skip


def block_scales(scales: Float32[Tensor, "n k"]) -> Float32[Tensor, "k4 n"]:
    """Of 128×128 blocks as cuBLAS takes them: k padded to a multiple of four, and side by side."""
    return F.pad(scales, (0, -scales.shape[1] % 4)).T


def swizzle(scales: Float32[Tensor, "R t"]) -> Tensor:
    """E8M0 scales of 1×32 tiles as Blackwell's tensor cores read them.

    128 rows of 4 scales make 512 bytes; row r and scale s are at 16 · (r mod 32) + 4 · (r // 32) + s (cuBLAS, "1D block
    scaling factors layout").
    """
    R, t = scales.shape
    padded = F.pad(scales.to(torch.float8_e8m0fnu).view(torch.uint8), (0, -t % 4, 0, -R % 128))
    parts = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return parts.flatten().view(torch.float8_e8m0fnu)


def _by_columns(scales: Tensor) -> Tensor:
    return torch.empty_strided(scales.shape, (1, len(scales)), device=scales.device).copy_(scales)
