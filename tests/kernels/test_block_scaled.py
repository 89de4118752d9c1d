import itertools
import math

import pytest
import torch

from rorqual.kernels.block_scaled import (
    block_starts,
    decode,
    decode_reference,
    quantize,
    round_elements,
    round_tiles,
    round_tiles_reference,
    scales_of,
    tile_amax,
    tile_amax_reference,
)
from rorqual.kernels.number_formats import (
    E2M1,
    E4M3,
    E5M6,
    E5M6_TILE,
    FP8_BLOCK,
    FP8_TENSOR,
    FP8_TILE,
    MXFP4,
    MXFP8,
    NVFP4,
    with_powers_of_two,
)

FORMATS = [FP8_TILE, FP8_BLOCK, FP8_TENSOR, E5M6_TILE, MXFP8, MXFP4, NVFP4, with_powers_of_two(FP8_BLOCK)]
EVERY = [*FORMATS, FP8_TILE.transposed, MXFP8.transposed]


def magnitudes(shape, seed=0):
    """Normal numbers over 24 binary orders."""
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape).float())


def all_floats():
    """FP32 numbers of every exponent, with the mantissas at which E4M3 rounds, and their neighbours."""
    mantissas = torch.tensor([(m << 19) + d for m in range(16) for d in (0, 1, -1) if (m << 19) + d >= 0])
    bits = (torch.arange(256)[:, None] << 23) + mantissas
    return torch.cat([bits.flatten(), bits.flatten() - (1 << 31)]).to(torch.int32).view(torch.float32)


def test_e4m3_is_torchs_cast_bit_for_bit():
    x = all_floats()
    x = x[x.abs() <= 464]  # beyond, torch's cast gives NaN
    ours = round_elements(x, E4M3)
    theirs = x.to(torch.float8_e4m3fn)
    assert torch.equal(ours.view(torch.int32), theirs.float().view(torch.int32))
    for codes in (round_tiles, round_tiles_reference):
        ones = torch.ones(len(x), 1)
        found, _ = codes(x[:, None], ones, FP8_TILE, None, True, False)
        assert torch.equal(found[:, 0], theirs.view(torch.uint8))


@pytest.mark.parametrize("way", [decode, decode_reference])
def test_all_256_codes_decode_as_torchs(way):
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    found = way(codes, torch.ones(256, 1), FP8_TILE, 1)
    assert torch.equal(
        found[:, 0].view(torch.int32) & 0x7FC00000,
        codes[:, 0].view(torch.float8_e4m3fn).float().view(torch.int32) & 0x7FC00000,
    )
    assert found.isnan().sum() == 2


def test_powers_of_two_are_torchs_e8m0_rounded_up():
    amax = torch.cat([torch.exp2(torch.arange(-100.0, 100)), torch.exp2(torch.arange(-100.0, 100)) * 1.01])[:, None]
    scales = scales_of(amax * 448, MXFP8)
    assert torch.equal(scales.to(torch.float8_e8m0fnu).float(), scales)
    assert torch.equal(scales[:200], amax[:200])
    assert torch.equal(scales[200:], 2 * amax[:200])


@pytest.mark.parametrize(
    ("element", "numbers"),
    [
        (E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (
            E5M6,
            [m * 2.0**-20 for m in range(64)] + [(64 + m) * 2.0 ** (e - 6) for e in range(-14, 16) for m in range(64)],
        ),
    ],
)
def test_elements_round_to_the_nearest_number_and_halves_to_even(element, numbers):
    grid = torch.tensor(numbers, dtype=torch.double)
    assert grid[-1] == element.largest
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, middle * (1 - 1e-6), middle * (1 + 1e-6)]).float()
    even = torch.where(torch.arange(len(middle)) % 2 == 0, grid[:-1], grid[1:])  # its code is even
    right = torch.cat([grid, even, grid[:-1], grid[1:]]).float()
    assert torch.equal(round_elements(x, element), right)
    assert torch.equal(round_elements(-x, element), -right)
    assert round_elements(torch.tensor([1e9]), element) == element.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (129, 257), (256, 96), (7, 31)])
def test_compiled_functions_equal_the_reference(compiled, format, shape, dtype):
    x = magnitudes(shape).to(dtype)
    for i, special in enumerate([0.0, -0.0, 1e-42, math.inf, math.nan, 3e38]):
        x[-1, min(i, shape[1] - 1)] = special
    starts = torch.tensor([0, shape[0] // 2, shape[0]]) if format.tile[0] > shape[0] > 1 else None
    starts = None if starts is None else starts.int()
    amax = tile_amax(x, format, starts)
    torch.testing.assert_close(amax, tile_amax_reference(x, format, starts), rtol=0, atol=0, equal_nan=True)
    for clean in (False, True):
        here = x.nan_to_num(0, 0, 0) if clean else x
        scales = scales_of(tile_amax(here, format, starts), format)
        codes, values = round_tiles(here, scales, format, starts, True, True)
        codes_, values_ = round_tiles_reference(here, scales, format, starts, True, True)
        if format.element.bits == 8:  # the sign of a NaN, such as that of inf / inf, is the processor's
            nan = codes_ & 127 == 127
            assert ((codes & 127 == 127) == nan).all()
            codes_ = torch.where(nan, codes, codes_)
        assert torch.equal(codes, codes_)
        torch.testing.assert_close(values, values_, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(round_tiles(here, scales, format, starts, True, False)[0], codes)
        torch.testing.assert_close(
            round_tiles(here, scales, format, starts, False, True)[1], values, rtol=0, atol=0, equal_nan=True
        )
        for way in (decode, decode_reference):
            back = way(codes, scales, format, shape[1], starts)
            if clean:
                assert torch.equal(back, values)
            else:
                torch.testing.assert_close(back.isnan(), values.isnan())


@pytest.mark.parametrize("format", EVERY, ids=lambda f: f.name)
def test_every_value_is_within_half_a_step_of_its_tile(format):
    x = magnitudes((150, 300), seed=1)
    found = quantize(x, format, values=True)
    element = format.element
    height, width = (size or 10_000 for size in format.tile)
    scales = found.scales.double().repeat_interleave(height, 0)[:150].repeat_interleave(width, 1)[:, :300]
    y = x.double() / scales
    step = torch.exp2(y.abs().log2().floor().clamp(min=element.least_exponent) - element.mantissa)
    error = (found.values.double() / scales - y).abs()
    inside = y.abs() <= element.largest
    assert (error[inside] <= 0.5000001 * step[inside]).all()
    if format.scale == "e4m3":  # the rounded scale may be an eighth too small: up to 1/16 saturates
        assert (y.abs() < element.largest * 1.0667).all()
    else:
        assert (y.abs() <= element.largest * 1.0000002).all()


def test_a_tile_of_zeros_and_a_tiny_one():
    x = torch.zeros(2, 128)
    x[1] = 1e-40
    found = quantize(x, FP8_TILE, values=True)
    assert not found.values[0].any()
    assert found.values.isfinite().all()


def test_an_outlier_costs_only_its_own_tile():
    x = torch.full((1, 256), 0.01)
    x[0, 0] = 1e4
    values = quantize(x, FP8_TILE, values=True).values
    assert not values[0, 1:128].any()  # 0.01 is below half the smallest number of the outlier's tile
    torch.testing.assert_close(values[0, 128:], x[0, 128:], rtol=1e-6, atol=0)


def test_blocks_start_anew_with_each_group():
    starts = block_starts(torch.tensor([0, 5, 5, 300], dtype=torch.int32), 128)
    assert starts.tolist() == [0, 5, 133, 261, 300]
    assert starts.dtype == torch.int32
    x = magnitudes((300, 8))
    whole = quantize(x, FP8_TILE.transposed, starts, values=True).values
    for first, last in itertools.pairwise(starts):
        own = quantize(x[first:last].contiguous(), FP8_TILE.transposed, values=True).values
        assert torch.equal(whole[first:last], own)


@pytest.mark.parametrize(("format", "size"), [(MXFP4, 0.5), (E5M6_TILE, 1.5), (FP8_TILE, 1)])
def test_codes_take_their_bits(format, size):
    assert quantize(magnitudes((4, 256)), format).codes.numel() == 4 * 256 * size
