# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""Round to E4M3 tiles in one pass: every program reads its tiles, finds their scales and writes codes.

Codes and scales are those of block_scaled.py bit for bit: rounding is done on the bits of FP32 numbers, since GPUs
without FP8 units, and Triton's interpreter, have no cast that rounds to even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.number_formats import E4M3, NumberFormat
from rorqual.shapes import Float, Float32, Int32, UInt8

TILES = {(1, 128), (128, 1), (128, 128), (1, 32), (32, 1)}
COLUMNS = 128  # of a program
ROWS = 16  # of a program whose tiles are one row high
TINY, INFINITY = tl.constexpr(0x00800000), tl.constexpr(0x7F800000)  # bits of 2^-126 and of infinity
LARGEST = tl.constexpr(0x43E00000)  # of 448
NORMAL = tl.constexpr(121 << 23)  # of 2^-6, E4M3's smallest normal number
STEP = tl.constexpr(141 << 23)  # of 2^14, whose neighbours are as far apart as E4M3's subnormals


def supports(format: NumberFormat) -> bool:
    return format.element == E4M3 and format.tile in TILES and format.scale != "e4m3"


def quantize_tiles(
    x: Float[Tensor, "R C"], format: NumberFormat, starts: Int32[Tensor, " blocks"] | None, by_columns: bool
) -> tuple[UInt8[Tensor, "R C"], Float32[Tensor, "b t"]]:
    """Codes and scales; by_columns: codes of a column lie side by side in memory."""
    return _launch(x, x.shape[1], format, starts, by_columns, swiglu=False, weights=None)


def quantize_swiglu_tiles(
    x: Float[Tensor, "R gate_up"],
    format: NumberFormat,
    starts: Int32[Tensor, " blocks"] | None,
    by_columns: bool,
    weights: Float32[Tensor, " R"] | None = None,
) -> tuple[UInt8[Tensor, "R C"], Float32[Tensor, "b t"]]:
    """Codes and scales of silu(gate) · up, each row times its weight, if there is one; x has gate, then up.

    The product is computed in FP32 and never written.
    """
    return _launch(x, x.shape[1] // 2, format, starts, by_columns, swiglu=True, weights=weights)


def _launch(
    x: Tensor,
    C: int,
    format: NumberFormat,
    starts: Tensor | None,
    by_columns: bool,
    swiglu: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (R, _), (height, width) = x.shape, format.tile
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = len(starts) - 1 if starts is not None else -(-R // height)
    tiles = -(-C // width)
    codes = x.new_empty((C, R), dtype=torch.uint8).T if by_columns else x.new_empty((R, C), dtype=torch.uint8)
    scales = x.new_empty((blocks, tiles), dtype=torch.float32)
    rows = height if height > 1 else ROWS
    assert starts is None or height > 1
    grid = (blocks if starts is not None else -(-R // rows), -(-C // COLUMNS))
    if grid[0] and grid[1]:
        _quantize[grid](
            x, x.stride(0), codes, *codes.stride(), scales, starts, weights, R, C, blocks, tiles,
            SWIGLU=swiglu, WEIGHTS=weights is not None, STARTS=starts is not None,
            POWER_OF_TWO=format.scale == "power of two",
            HEIGHT=height, WIDTH=width, ROWS=rows, COLUMNS=COLUMNS, num_warps=8 if rows == 128 else 4,
        )  # fmt: skip
    return codes, scales


@triton.jit
def _quantize(
    x, x_stride, codes, row_stride, column_stride, scales, starts, weights, R, C, blocks, tiles,
    SWIGLU: tl.constexpr, WEIGHTS: tl.constexpr, STARTS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0), tl.program_id(1)
    if STARTS:
        first, last = tl.load(starts + i), tl.load(starts + i + 1)
    else:
        first = i * ROWS
        last = tl.minimum(first + ROWS, R)
    r, c = first + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < last)[:, None] & (c < C)[None, :]
    at = x + r.to(tl.int64)[:, None] * x_stride + c[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(at + C, mask=inside, other=0.0).to(tl.float32)
        value = value / (1.0 + tl.exp(-value)) * up
    if WEIGHTS:
        value *= tl.load(weights + r, mask=r < last, other=0.0)[:, None]
    # As integers, magnitudes are ordered as they are, with infinity and then NaN above all.
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    size = tl.reshape(size, (ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH))
    largest = tl.max(tl.max(size, axis=3), axis=1)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    bits = tl.maximum(scale.to(tl.int32, bitcast=True), TINY)
    if POWER_OF_TWO:
        bits = tl.where(bits < INFINITY, (bits + 0x7FFFFF) & INFINITY, bits)
    scale = bits.to(tl.float32, bitcast=True)
    wide = tl.broadcast_to(scale[:, None, :, None], (ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH))
    code = _encode(tl.div_rn(value, tl.reshape(wide, (ROWS, COLUMNS))))
    place = r.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * column_stride
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    b = i * (ROWS // HEIGHT) + tl.arange(0, ROWS // HEIGHT)
    t = j * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    tl.store(scales + b[:, None] * tiles + t[None, :], scale, mask=(b < blocks)[:, None] & (t < tiles)[None, :])


@triton.jit
def _encode(y):
    """FP32 → codes of E4M3: to nearest, ties to even; larger numbers saturate, NaN stays."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    kept = tl.minimum(size, LARGEST)
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - STEP
    code = tl.where(kept < NORMAL, subnormal, normal)
    return tl.where(size > INFINITY, 0x7F, code) | ((bits >> 24) & 0x80)
