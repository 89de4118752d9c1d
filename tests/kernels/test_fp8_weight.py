"""FP8 weights: products are those of the dequantised weights, and only experts with rows are dequantised."""

from dataclasses import replace

import pytest
import torch

from rorqual.kernels import linear as linear_kernel
from rorqual.kernels.fp8_weight import FP8Weight, dequantize
from rorqual.kernels.linear import grouped_linear, linear
from rorqual.kernels.number_formats import FP8_BLOCK

PARTS = [0, 128, 136, 264, 272]  # two matrices of 136 rows, whose blocks are their own


def made(E, parts=None, N=272, K=160, seed=0):
    """A weight of random codes (no NaN) and scales, and the same as numbers [E, N, K]."""
    generator = torch.Generator().manual_seed(seed)
    starts = parts or [*range(0, N, 128), N]
    codes = torch.randint(0, 127, (E, N, K), generator=generator, dtype=torch.uint8)
    codes += torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8) * 128
    scales = torch.rand(E, len(starts) - 1, -(-K // 128), generator=generator) / 1000 + 1e-4
    numbers = codes.view(torch.float8_e4m3fn).float()
    for e in range(E):
        for i in range(len(starts) - 1):
            for j in range(scales.shape[2]):
                numbers[e, starts[i] : starts[i + 1], 128 * j : 128 * (j + 1)] *= scales[e, i, j]
    begins = torch.tensor(parts, dtype=torch.int32) if parts else None
    return FP8Weight(codes, scales, FP8_BLOCK, begins), numbers


@pytest.mark.parametrize("parts", [None, PARTS], ids=["one part", "two parts"])
def test_dequantised(parts):
    weight, numbers = made(3, parts)
    for e in range(3):
        assert torch.equal(dequantize(weight, e), numbers[e])


def test_blocks_larger_than_the_weight():
    weight, _ = made(1, N=40, K=50)
    large = replace(weight, format=replace(FP8_BLOCK, tile=(10**12, 10**12)))
    assert torch.equal(dequantize(large), dequantize(weight))


def test_scales_in_a_byte():
    weight, _ = made(1)
    powers = torch.tensor([-3.0, 0, 5, -127, 2, 1]).exp2().view(1, 3, 2)
    found = dequantize(replace(weight, scales=powers.to(torch.float8_e8m0fnu)))
    assert torch.equal(found, dequantize(replace(weight, scales=powers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_linear(dtype, rows):
    weight, numbers = made(1)
    x, bias = torch.randn(rows, 160).to(dtype), torch.randn(272).to(dtype)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), linear(x, numbers[0].to(dtype), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_rows_are_not_dequantised(monkeypatch, dtype):
    weight, numbers = made(5, PARTS)
    ends = torch.tensor([0, 9, 9, 10, 10], dtype=torch.int32)
    x, seen = torch.randn(10, 160).to(dtype), []
    monkeypatch.setattr(linear_kernel, "dequantize", lambda w, e: seen.append(e) or dequantize(w, e))
    with torch.no_grad():
        found = grouped_linear(x, weight, ends)
        expected = [linear(x[:9], numbers[1].to(dtype)), linear(x[9:], numbers[3].to(dtype))]
    assert seen == [1, 3]
    assert torch.equal(found, torch.cat(expected))
