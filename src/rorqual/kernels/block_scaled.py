"""Round matrices to small number formats with a scale by tile, and back.

R rows, C columns, b × t tiles. `starts` [b+1] cuts the rows into blocks of its own, each at most as high as the
format's tiles: rows of different experts never share a scale. A scale is at least the smallest normal FP32 number, so a
tile of zeros stays zero. A tile with NaN or infinity becomes NaN throughout or where it was infinite.

Compiled, one pass finds the scales and one rounds.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu, gpu
from rorqual.kernels.number_formats import E4M3, Element, NumberFormat
from rorqual.shapes import Float, Float32, Int32, UInt8

SMALLEST = torch.finfo(torch.float32).tiny
Starts = Int32[Tensor, " blocks"] | None


@dataclass(frozen=True)
class BlockScaled:
    """A rounded matrix: as codes and scales, as FP32 values, or both."""

    format: NumberFormat
    shape: tuple[int, int]
    scales: Float32[Tensor, "b t"]
    starts: Starts
    codes: UInt8[Tensor, "R _"] | None  # 4 and 12 bits: two codes in one and three bytes, the first in the lower bits
    rounded: Float32[Tensor, "R C"] | None
    every: int = 0  # rows of each of the stacked matrices with which `starts` begins anew; 0: there is one

    @property
    def kept(self) -> tuple[UInt8[Tensor, "R _"], Float32[Tensor, "b t"]]:
        """Codes and scales."""
        assert self.codes is not None
        return self.codes, self.scales

    @property
    def values(self) -> Float32[Tensor, "R C"]:
        """element · scale, in FP32."""
        if self.rounded is not None:
            return self.rounded
        assert self.codes is not None
        return decode(self.codes, self.scales, self.format, self.shape[1], self.starts)


def quantize(
    x: Float[Tensor, "R C"],
    format: NumberFormat,
    starts: Starts = None,
    *,
    codes: bool = True,
    values: bool = False,
    by_columns: bool = False,
) -> BlockScaled:
    """x to the nearest numbers of `format`, ties to even, with scales from the largest magnitude of every tile.

    `codes`, `values`: what to compute; on a GPU codes alone, which its products take. `by_columns`: codes of a column
    lie side by side there, as those of tiles that are one column wide do anyway: for products over rows.
    """
    if gpu.quantizes(x, format):
        from rorqual.kernels.triton.quantize import quantize_tiles

        found, scales = quantize_tiles(x, format, starts, by_columns or format.tile[1] == 1)
        return BlockScaled(format, (x.shape[0], x.shape[1]), scales, starts, found, None)
    codes, values = codes or x.is_cuda, values and not x.is_cuda
    scales = scales_of(tile_amax(x, format, starts), format)
    found, rounded = round_tiles(x, scales, format, starts, codes, values)
    return BlockScaled(format, (x.shape[0], x.shape[1]), scales, starts, found, rounded)


def quantize_reference(x: Float[Tensor, "R C"], format: NumberFormat, starts: Starts = None) -> BlockScaled:
    """Codes and scales, in PyTorch alone."""
    scales = scales_of(tile_amax_reference(x, format, starts), format)
    codes, _ = round_tiles_reference(x, scales, format, starts, True, False)
    return BlockScaled(format, (x.shape[0], x.shape[1]), scales, starts, codes, None)


def scales_of(amax: Float32[Tensor, "b t"], format: NumberFormat) -> Float32[Tensor, "b t"]:
    """The scale of every tile from its largest magnitude."""
    largest = format.element.largest
    if format.scale == "e4m3":  # E4M3 scales, times the FP32 scale of the whole matrix
        whole = (amax.amax() / (E4M3.largest * largest)).clamp(min=SMALLEST)
        least = 2.0 ** (E4M3.least_exponent - E4M3.mantissa)
        return round_elements(amax / largest / whole, E4M3).clamp(min=least) * whole
    scale = (amax / largest).clamp(min=SMALLEST)
    if format.scale == "fp32":
        return scale
    up = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(scale.isfinite(), up, scale)


def tile_amax(x: Float[Tensor, "R C"], format: NumberFormat, starts: Starts = None) -> Float32[Tensor, "b t"]:
    """The largest magnitude of every tile; NaN where there is one."""
    if not cpu.usable(x):
        return tile_amax_reference(x, format, starts)
    whole = format.tile == (0, 0)
    (height, width), (R, C) = (1, 0) if whole else format.tile, x.shape
    blocks = len(starts) - 1 if starts is not None else -(-R // height)
    amax = x.new_empty(blocks, -(-C // width) if width else 1, dtype=torch.float32)
    cpu.call("tile_amax", x.dtype, x, x.stride(0), R, C, starts, blocks, height, width or C, amax)
    return amax.amax(dim=0, keepdim=True) if whole else amax


def tile_amax_reference(x: Float[Tensor, "R C"], format: NumberFormat, starts: Starts = None) -> Float32[Tensor, "b t"]:
    R, C = x.shape
    width = format.tile[1] or C
    padded = F.pad(x.float().abs(), (0, -C % width))
    amax = torch.unflatten(padded, 1, (-1, width)).amax(-1)
    blocks = len(starts) - 1 if starts is not None else format.tiles(R, C)[0]
    index = _block_of_rows(x, format, starts).unsqueeze(1).expand_as(amax)
    return amax.new_zeros(blocks, amax.shape[1]).scatter_reduce_(0, index, amax, "amax")


def round_tiles(
    x: Float[Tensor, "R C"], scales: Float32[Tensor, "b t"], format: NumberFormat, starts: Starts, codes: bool,
    values: bool,
) -> tuple[UInt8[Tensor, "R _"] | None, Float32[Tensor, "R C"] | None]:  # fmt: skip
    """x / scale rounded to elements: their codes, and their values times the scale."""
    if not cpu.usable(x):
        return round_tiles_reference(x, scales, format, starts, codes, values)
    element, (R, C) = format.element, x.shape
    found = x.new_empty(R, -(-C * element.bits // 8), dtype=torch.uint8) if codes else None
    rounded = x.new_empty(R, C, dtype=torch.float32) if values else None
    numbers = element.mantissa, element.least_exponent, element.largest, element.bits
    tiles = _tiles(format, R, C, starts)
    cpu.call("round_tiles", x.dtype, x, x.stride(0), *tiles, scales, _stride(format, scales), *numbers, rounded, found)
    return found, rounded


def round_tiles_reference(
    x: Float[Tensor, "R C"], scales: Float32[Tensor, "b t"], format: NumberFormat, starts: Starts, codes: bool,
    values: bool,
) -> tuple[UInt8[Tensor, "R _"] | None, Float32[Tensor, "R C"] | None]:  # fmt: skip
    wide = _expand(scales, format, x.shape[1], _block_of_rows(x, format, starts))
    y = round_elements(x.float() / wide, format.element)
    return _pack(_codes(y, format.element), format.element) if codes else None, y * wide if values else None


def decode(
    codes: UInt8[Tensor, "R _"], scales: Float32[Tensor, "b t"], format: NumberFormat, columns: int,
    starts: Starts = None,
) -> Float32[Tensor, "R C"]:  # fmt: skip
    """element · scale in FP32."""
    if not codes.is_contiguous() or not cpu.usable(scales):
        return decode_reference(codes, scales, format, columns, starts)
    element, R = format.element, len(codes)
    out = scales.new_empty(R, columns)
    numbers = element.mantissa, element.least_exponent, element.bits
    tiles = _tiles(format, R, columns, starts)
    cpu.call("decode_tiles", torch.float32, codes, *tiles, scales, _stride(format, scales), *numbers, out)
    return out


def decode_reference(
    codes: UInt8[Tensor, "R _"], scales: Float32[Tensor, "b t"], format: NumberFormat, columns: int,
    starts: Starts = None,
) -> Float32[Tensor, "R C"]:  # fmt: skip
    numbers = _numbers(_unpack(codes, format.element, columns), format.element)
    return numbers * _expand(scales, format, columns, _block_of_rows(codes, format, starts))


def round_elements(x: Float32[Tensor, "*S"], element: Element) -> Float32[Tensor, "*S"]:
    """The nearest numbers of the format, ties to even; larger ones saturate, NaN stays.

    Adding and subtracting 1.5 · 2^(e + 23 − mantissa) rounds a number of exponent e.
    """
    size = x.abs().clamp(max=element.largest)
    least = (127 + element.least_exponent) << 23
    exponent = (size.view(torch.int32) & 0x7F800000).clamp(min=least)
    magic = ((exponent + ((23 - element.mantissa) << 23)) | 0x400000).view(torch.float32)
    return ((size + magic) - magic).copysign(x)


def block_starts(ends: Int32[Tensor, " E"], height: int) -> Int32[Tensor, " blocks"]:
    """Blocks of at most `height` rows that start anew with each group of rows, group e ending at ends[e]."""
    starts, first = [0], 0
    for end in map(int, ends.cpu().numpy()):
        starts += [*range(first + height, end, height), *([end] if end > first else [])]
        first = end
    return torch.tensor(starts, dtype=torch.int32, device=ends.device)


def block_starts_on_device(ends: Int32[Tensor, " E"], height: int, rows: int) -> Int32[Tensor, " blocks"]:
    """The same without waiting for the GPU: as many blocks as `rows` could need, the last of them empty."""
    first = F.pad(ends[:-1], (1, 0))
    blocks = (ends - first + (height - 1)).div(height, rounding_mode="floor")
    until = blocks.cumsum(0)
    block = torch.arange(rows // height + len(ends), device=ends.device)
    expert = torch.searchsorted(until, block, right=True).clamp_(max=len(ends) - 1)
    start = first[expert] + (block - until[expert] + blocks[expert]) * height
    return F.pad(start.minimum(ends[-1]), (0, 1), value=rows).to(torch.int32)


def _tiles(format: NumberFormat, rows: int, columns: int, starts: Starts) -> tuple[Tensor | int | None, ...]:
    """Arguments of the compiled functions."""
    height, width = format.tile
    height = height or 1  # a scale for all: it is the same for every row
    blocks = len(starts) - 1 if starts is not None else -(-rows // height)
    return rows, columns, starts, blocks, height, width or columns


def _stride(format: NumberFormat, scales: Tensor) -> int:
    return scales.shape[1] if format.tile[0] else 0


def _block_of_rows(x: Tensor, format: NumberFormat, starts: Starts) -> Tensor:
    if starts is not None:
        sizes = starts.diff().long()
        return torch.arange(len(sizes), device=x.device).repeat_interleave(sizes, output_size=len(x))
    rows = torch.arange(len(x), device=x.device)
    return rows // format.tile[0] if format.tile[0] else torch.zeros_like(rows)


def _expand(scales: Tensor, format: NumberFormat, columns: int, block: Tensor) -> Tensor:
    return scales.index_select(0, block).repeat_interleave(format.tile[1] or columns, 1)[:, :columns]


def _codes(y: Tensor, element: Element) -> Tensor:
    """The codes of numbers of the format, int32: sign, exponent, mantissa."""
    least, sign = (127 + element.least_exponent) << 23, 1 << (element.bits - 1)
    size = y.abs()
    magnitude = size.view(torch.int32)
    subnormal = (size + 2.0**element.least_exponent).view(torch.int32) - least
    code = torch.where(magnitude < least, subnormal, magnitude - least + 0x800000) >> (23 - element.mantissa)
    return torch.where(y.isnan(), sign - 1, code) + y.signbit() * sign


def _numbers(codes: Tensor, element: Element) -> Tensor:
    """The numbers of int32 codes."""
    sign = 1 << (element.bits - 1)
    magnitude = codes & (sign - 1)
    subnormal = magnitude * 2.0 ** (element.least_exponent - element.mantissa)
    shifted = (magnitude << (23 - element.mantissa)) + ((126 + element.least_exponent) << 23)
    size = torch.where(magnitude >> element.mantissa > 0, shifted.view(torch.float32), subnormal)
    if element.bits == 8:
        size = size.masked_fill(magnitude == sign - 1, float("nan"))
    return torch.where(codes >= sign, -size, size)


def _pack(codes: Tensor, element: Element) -> Tensor:
    if element.bits == 8:
        return codes.to(torch.uint8)
    columns = codes.shape[1]
    padded = F.pad(codes, (0, columns % 2))
    both = padded[:, ::2] | padded[:, 1::2] << element.bits
    out = torch.stack([(both >> 8 * i) & 255 for i in range(element.bits // 4)], dim=-1)
    return out.flatten(1)[:, : -(-columns * element.bits // 8)].to(torch.uint8)


def _unpack(codes: Tensor, element: Element, columns: int) -> Tensor:
    wide = codes.to(torch.int32)
    if element.bits == 8:
        return wide
    each = element.bits // 4  # bytes of two codes
    padded = F.pad(wide, (0, -wide.shape[1] % each))
    both = torch.stack([padded[:, i::each] << 8 * i for i in range(each)]).sum(0, dtype=torch.int32)
    most = (1 << element.bits) - 1
    return torch.stack([both & most, both >> element.bits], dim=-1).flatten(1)[:, :columns]
