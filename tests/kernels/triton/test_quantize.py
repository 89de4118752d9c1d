import math

import pytest
import torch

from rorqual.kernels.block_scaled import block_starts, quantize
from rorqual.kernels.number_formats import FP8_BLOCK, FP8_TILE, MXFP8, with_powers_of_two
from rorqual.kernels.swiglu import swiglu_joined_reference

FORMATS = [
    *(FP8_TILE, FP8_TILE.transposed, FP8_BLOCK, MXFP8, MXFP8.transposed),
    *(with_powers_of_two(f) for f in (FP8_TILE, FP8_TILE.transposed, FP8_BLOCK)),
]
NAN = 0x7F


def magnitudes(shape, seed=0):
    """Normal numbers over 24 binary orders."""
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape).float())


def same(found, right):
    """Bit for bit; the sign of NaN is the processor's choice."""
    (codes, scales), (codes_, scales_) = found, right.kept
    codes = codes.cpu()
    nan = (codes_ & NAN) == NAN
    assert torch.equal(codes & NAN == NAN, nan)
    assert torch.equal(codes[~nan], codes_[~nan])
    torch.testing.assert_close(scales.cpu(), scales_, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="session")
def kernels(device):
    from rorqual.kernels.triton import quantize

    return quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name} {f.tile}")
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (129, 257), (128, 256)])
def test_codes_and_scales_are_the_references(kernels, device, format, shape, dtype):
    x = magnitudes(shape).to(dtype)
    x[0, 0] = 1e4  # alone in its tile
    same(kernels.quantize_tiles(x.to(device), format, None, False), quantize(x, format))
    for i, special in enumerate([0.0, -0.0, 1e-42, math.inf, math.nan, 3e38, -math.inf]):
        x[-1, min(i * 20, shape[1] - 1)] = special
    by_columns, _ = found = kernels.quantize_tiles(x.to(device), format, None, True)
    same(found, quantize(x, format))
    assert by_columns.stride(0) == 1 or min(shape) == 1


def test_every_exponent_and_every_tie(kernels, device):
    mantissas = torch.tensor([(m << 19) + d for m in range(16) for d in (0, 1, -1) if (m << 19) + d >= 0])
    x = ((torch.arange(255)[:, None] << 23) + mantissas).to(torch.int32).view(torch.float32)
    x = torch.cat([x, -x])
    x = torch.cat([x, x.new_full((len(x), 1), 448.0)], dim=1)  # a scale of one, where no other number is larger
    same(kernels.quantize_tiles(x.to(device), FP8_TILE, None, False), quantize(x, FP8_TILE))
    same(kernels.quantize_tiles(x[-1:].to(device), FP8_TILE, None, False), quantize(x[-1:], FP8_TILE))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 2e-38, 3.4e38])
@pytest.mark.parametrize("format", [FP8_TILE, with_powers_of_two(FP8_TILE)], ids=lambda f: f.name)
def test_zeros_and_the_ends_of_the_range(kernels, device, format, value):
    x = torch.full((2, 129), value)
    same(kernels.quantize_tiles(x.to(device), format, None, False), quantize(x, format))


def test_rows_that_are_not_contiguous(kernels, device):
    x = magnitudes((40, 300))
    for view in (x[:, 5:140], x.T):
        same(kernels.quantize_tiles(view.to(device), FP8_TILE, None, False), quantize(view.contiguous(), FP8_TILE))


@pytest.mark.parametrize("format", [FP8_TILE.transposed, FP8_BLOCK, MXFP8.transposed], ids=lambda f: f.name)
def test_blocks_of_experts(kernels, device, format):
    ends = torch.tensor([0, 5, 5, 200, 300], dtype=torch.int32)
    x = magnitudes((300, 140))
    starts = block_starts(ends, format.tile[0])
    same(kernels.quantize_tiles(x.to(device), format, starts.to(device), True), quantize(x, format, starts))
    empty = torch.cat([starts, starts[-1:], starts[-1:]])
    codes, scales = kernels.quantize_tiles(x.to(device), format, empty.to(device), True)
    same((codes, scales[:-2]), quantize(x, format, starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [FP8_TILE, FP8_TILE.transposed, MXFP8], ids=lambda f: f"{f.name} {f.tile}")
@pytest.mark.parametrize("width", [1, 33, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_rounding_in_one(kernels, device, format, width, dtype, weighted):
    """Exponentials differ in the last bits between processors, and so may a code at a tie, by one."""
    x = (magnitudes((37, 2 * width)) / 64).to(dtype)
    weights = torch.rand(37) if weighted else None
    right = quantize(swiglu_joined_reference(x.float(), weights), format)
    weights = weights.to(device) if weighted else None
    codes, scales = kernels.quantize_swiglu_tiles(x.to(device), format, None, False, weights)
    if format is not MXFP8:
        torch.testing.assert_close(scales.cpu(), right.scales, rtol=1e-6, atol=0)
    else:
        assert torch.equal(scales.cpu(), right.scales)
    apart = (codes.cpu().int() - right.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.002 or width == 1
