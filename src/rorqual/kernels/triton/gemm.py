# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""Products of E4M3 matrices with scales by tile, also grouped by expert.

M rows, N outputs, K contracted, E experts. One step along K is one tile (128 or 32 wide): its product of codes, from
the tensor cores, is scaled and added in FP32, which is V3's promotion (§3.3.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.block_scaled import BlockScaled
from rorqual.shapes import Float, Int32

SIDE = 128  # of the part of the result that a program computes
TOGETHER = 8  # rows of programs that run side by side, so that they find the other factor in the cache
Ends = Int32[Tensor, " E"] | None


def rows_product(
    x: BlockScaled, weight: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype, turned: bool
) -> Float[Tensor, "M N"]:
    """x·weightᵀ, or x·weight if turned, with each row's expert. x has tiles of one row."""
    (a, a_scales), (b, b_scales) = (_floats(x), x.scales), (_floats(weight), weight.scales)
    M, K = x.shape
    rows, columns = weight.shape[0] // experts, weight.shape[1]
    blocks, tiles = b_scales.shape[0] // experts, b_scales.shape[1]
    if turned:
        N, along = columns, (b.stride(1), b.stride(0))
        steps, tile, every = (1, tiles), weight.format.tile[1], columns
    else:
        N, along = rows, b.stride()
        steps, tile, every = (tiles, 1), weight.format.tile[0], weight.every or rows
    out = a.new_empty((M, N), dtype=dtype)
    high = -(-M // SIDE) + (experts - 1 if experts > 1 else 0)  # enough for any loads
    if M and N:
        _rows[(high * -(-N // SIDE),)](
            a, *a.stride(), a_scales, a_scales.stride(0), b, rows * b.stride(0), *along, b_scales, blocks * tiles,
            *steps, out, ends, M, N, K, experts, high, every, tile, STEP=x.format.tile[1], GROUPED=experts > 1,
            EXPERTS=triton.next_power_of_2(experts), SIDE=SIDE, TOGETHER=TOGETHER, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def weight_gradient(
    grad: BlockScaled, x: BlockScaled, experts: int, ends: Ends, dtype: torch.dtype
) -> Float[Tensor, "E N K"]:
    """gradᵀ·x over each expert's rows. Both have tiles of one column, which start anew with each expert."""
    (a, a_scales), (b, b_scales) = (_floats(grad), grad.scales), (_floats(x), x.scales)
    (M, N), K = grad.shape, x.shape[1]
    out = a.new_empty((experts, N, K), dtype=dtype)
    _columns[(-(-N // SIDE) * -(-K // SIDE), experts)](
        a, *a.stride(), a_scales, a_scales.stride(0), b, *b.stride(), b_scales, b_scales.stride(0), out, ends, M, N, K,
        experts, STEP=x.format.tile[0], GROUPED=experts > 1, EXPERTS=triton.next_power_of_2(experts), SIDE=SIDE,
        TOGETHER=TOGETHER, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def _floats(x: BlockScaled) -> Tensor:
    assert x.codes is not None
    return x.codes.view(torch.float8_e4m3fn)


@triton.jit
def _rows(
    a, a_row, a_column, a_scales, a_scales_row, b, b_expert, b_row, b_column, b_scales, b_scales_expert, b_scales_tile,
    b_scales_step, out, ends, M, N, K, experts, high, every, tile, STEP: tl.constexpr, GROUPED: tl.constexpr,
    EXPERTS: tl.constexpr, SIDE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    pid, wide = tl.program_id(0), tl.cdiv(N, SIDE)
    i, j = tl.swizzle2d(pid // wide, pid % wide, high, wide, TOGETHER)
    if GROUPED:
        e = tl.arange(0, EXPERTS)
        stop = tl.load(ends + e, mask=e < experts, other=0)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
        parts = tl.where(e < experts, tl.cdiv(stop - start, SIDE), 0)
        until = tl.cumsum(parts, 0)
        expert = tl.sum((until <= i).to(tl.int32), 0)
        if expert >= experts:
            return
        mine = e == expert
        first = tl.sum(tl.where(mine, start + (i - until + parts) * SIDE, 0), 0)
        last = tl.sum(tl.where(mine, stop, 0), 0)
    else:
        expert, first, last = 0, i * SIDE, M
    m, n = first + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    group = tl.cast(expert, tl.int64)
    block = n // every * tl.cdiv(every, tile) + n % every // tile
    total = _accumulate(
        a + m.to(tl.int64) * a_row, a_column, a_scales + m.to(tl.int64) * a_scales_row, 1, m < last,
        b + group * b_expert + n.to(tl.int64) * b_row, b_column,
        b_scales + group * b_scales_expert + block * b_scales_tile, b_scales_step, n < N, 0, K, STEP, SIDE,
    )  # fmt: skip
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m < last)[:, None] & (n < N)[None, :])


@triton.jit
def _columns(
    a, a_row, a_column, a_scales, a_scales_row, b, b_row, b_column, b_scales, b_scales_row, out, ends, M, N, K, experts,
    STEP: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, SIDE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    pid, expert, wide = tl.program_id(0), tl.program_id(1), tl.cdiv(K, SIDE)
    i, j = tl.swizzle2d(pid // wide, pid % wide, tl.cdiv(N, SIDE), wide, TOGETHER)
    if GROUPED:
        e = tl.arange(0, EXPERTS)
        stop = tl.load(ends + e, mask=e < experts, other=0)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
        before = tl.sum(tl.where(e < expert, tl.cdiv(stop - start, STEP), 0), 0)  # blocks
        first = tl.sum(tl.where(e == expert, start, 0), 0)
        last = tl.sum(tl.where(e == expert, stop, 0), 0)
    else:
        before, first, last = 0, 0, M
    n, k = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    total = _accumulate(
        a + n.to(tl.int64) * a_column, a_row, a_scales + before * a_scales_row + n, a_scales_row, n < N,
        b + k.to(tl.int64) * b_column, b_row, b_scales + before * b_scales_row + k, b_scales_row, k < K,
        first, last, STEP, SIDE,
    )  # fmt: skip
    place = out + (tl.cast(expert, tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _accumulate(
    a, a_along, a_scales, a_step, a_inside, b, b_along, b_scales, b_step, b_inside, first, last,
    STEP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The sum over first ≤ k < last of both factors' tiles; a, b: where the row of each result begins."""
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for t in range(tl.cdiv(last - first, STEP)):
        k = (first + t * STEP + tl.arange(0, STEP)).to(tl.int64)
        left = tl.load(a[:, None] + (k * a_along)[None, :], mask=a_inside[:, None] & (k < last)[None, :], other=0.0)
        right = tl.load(b[None, :] + (k * b_along)[:, None], mask=b_inside[None, :] & (k < last)[:, None], other=0.0)
        left_scale = tl.load(a_scales + t * a_step, mask=a_inside, other=0.0)
        right_scale = tl.load(b_scales + t * b_step, mask=b_inside, other=0.0)
        total += tl.dot(left, right) * left_scale[:, None] * right_scale[None, :]
    return total
