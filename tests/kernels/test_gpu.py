"""Which kernel is chosen, on chips that are not here, and how scales are laid out for PyTorch's product."""

from typing import get_args

import pytest
import torch

from rorqual.kernels import gpu
from rorqual.kernels.block_scaled import quantize
from rorqual.kernels.gpu import NONE, Chip, Factor, Kind
from rorqual.kernels.number_formats import (
    E5M6_TILE,
    FP8_BLOCK,
    FP8_TENSOR,
    FP8_TILE,
    MXFP4,
    MXFP8,
    NVFP4,
    with_powers_of_two,
)

HOPPER, OLD_CUDA = Chip((9, 0), (13, 0), True), Chip((9, 0), (12, 8), True)
BLACKWELL, ADA, AMPERE = Chip((10, 0), (13, 0), True), Chip((8, 9), (13, 0), True), Chip((8, 0), (13, 0), True)
V3 = (FP8_TILE, FP8_BLOCK, FP8_BLOCK)
MX = (MXFP8, MXFP8, MXFP8.transposed)
UE8M0 = tuple(with_powers_of_two(f) for f in V3)


def ways(formats, chip, M=256, K=512, N=384, experts=1, every=0):
    """Of output, input gradient and weight gradient."""
    activation, weight, transposed = formats
    x, grad = Factor(activation, (M, K)), Factor(activation, (M, N))
    pairs = {
        "output": (x, Factor(weight, (N * experts, K), every)),
        "input gradient": (grad, Factor(transposed, (N * experts, K), every)),
        "weight gradient": (grad._replace(format=activation.transposed), x._replace(format=activation.transposed)),
    }
    assert tuple(pairs) == get_args(Kind)
    return [gpu.way(kind, *pair, experts, chip) for kind, pair in pairs.items()]


@pytest.mark.parametrize(
    ("chip", "fp8", "mx"),
    [
        (HOPPER, "torch", "triton"),
        (OLD_CUDA, "triton", "triton"),
        (BLACKWELL, "triton", "torch"),
        (ADA, "triton", "triton"),
        (AMPERE, "reference", "reference"),
        (NONE, "reference", "reference"),
        (HOPPER._replace(triton=False), "torch", "reference"),
        (ADA._replace(triton=False), "reference", "reference"),
    ],
)
def test_chips(chip, fp8, mx):
    assert ways(V3, chip) == [fp8] * 3
    assert ways(UE8M0, chip) == [fp8] * 3
    assert ways(MX, chip) == [mx] * 3


def test_odd_shapes_and_experts_are_tritons():
    for chip, formats in ((HOPPER, V3), (BLACKWELL, MX)):
        assert ways(formats, chip, experts=4) == ["triton"] * 3
        assert ways(formats, chip, M=250) == ["triton"] * 3
        assert ways(formats, chip, K=500, N=130) == ["triton"] * 3
    assert ways(V3, HOPPER, M=144) == ["torch", "torch", "triton"]  # rows are contracted only for weights


def test_other_formats_have_no_kernel():
    for weight in (MXFP4, NVFP4):
        assert ways((FP8_TILE, weight, weight), HOPPER)[:2] == ["reference"] * 2
    assert ways((FP8_TENSOR,) * 3, HOPPER) == ["reference"] * 3
    assert ways((E5M6_TILE, FP8_BLOCK, FP8_BLOCK), HOPPER)[:2] == ["reference"] * 2
    assert ways((MXFP8, FP8_BLOCK, FP8_BLOCK), HOPPER)[:2] == ["reference"] * 2


def test_blocks_of_stacked_weights_that_cross_the_gradients_tiles_have_no_kernel():
    assert ways(V3, HOPPER, N=384, every=192, experts=2) == ["triton", "reference", "triton"]
    assert ways(V3, HOPPER, N=200, every=200, experts=2) == ["triton"] * 3


def test_no_gpu_here_means_no_kernel():
    x = torch.randn(2, 128)
    assert gpu.chip(x.device) == NONE
    assert not gpu.quantizes(x, FP8_TILE)


@pytest.mark.parametrize("shape", [(1, 1), (130, 7), (256, 8)])
def test_swizzled_scales_are_where_cublas_reads_them(shape):
    torch.manual_seed(0)
    scales = torch.exp2(torch.randint(-100, 100, shape).float())
    found = gpu.swizzle(scales)
    high, wide = -(-shape[0] // 128), -(-shape[1] // 4)
    assert found.numel() == high * wide * 512
    for r in range(shape[0]):
        for s in range(shape[1]):
            at = (r // 128 * wide + s // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + s % 4
            assert found[at].float() == scales[r, s]


def test_scales_of_blocks_are_padded_to_four():
    scales = torch.randn(3, 6)
    found = gpu.block_scales(scales)
    assert found.shape == (8, 3)
    assert found.stride() == (1, 8)
    assert torch.equal(found[:6], scales.T)


@pytest.mark.parametrize("formats", [V3, MX], ids=["fp8", "mxfp8"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_pytorchs_product_gets_its_factors_as_it_wants_them(monkeypatch, kind, formats):
    """The function itself runs on a GPU alone; here one that decodes what it is given."""
    M, K, N = 256, 384, 128
    made = {}

    def decoding(a, b, a_scale, a_kind, b_scale, b_kind, swizzle_a=None, swizzle_b=None, output_dtype=None):
        assert a.stride(1) == 1
        assert b.stride(0) == 1
        made.update(a=a_scale, b=b_scale, kinds=(a_kind, b_kind), swizzles=(swizzle_a, swizzle_b))
        a, b = a.float(), b.float().T  # both [outer, contracted]
        if a_kind.name == "BlockWise1x32":
            a_scale, b_scale = (_straight(s, x) for s, x in ((a_scale, a), (b_scale, b)))
            return ((a * a_scale) @ (b * b_scale).T).to(output_dtype)
        assert a_scale.shape == (len(a), a.shape[1] // 128)
        assert a_scale.stride() == (1, len(a))
        if b_kind.name == "BlockWise128x128":
            b_scale = b_scale[: b.shape[1] // 128].T.repeat_interleave(128, 0)
        else:
            assert b_scale.stride() == (1, len(b))
        wide = [s.repeat_interleave(128, 1) for s in (a_scale, b_scale)]
        return ((a * wide[0]) @ (b * wide[1]).T).to(output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", decoding)
    torch.manual_seed(0)
    x, grad, weight = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K)
    if kind == "output":
        left, right = quantize(x, formats[0]), quantize(weight, formats[1])
        exact = left.values.double() @ right.values.double().T
    elif kind == "input gradient":
        left, right = quantize(grad, formats[0]), quantize(weight, formats[2])
        exact = left.values.double() @ right.values.double()
    else:
        left, right = (quantize(t, formats[0].transposed) for t in (grad, x))
        exact = left.values.double().T @ right.values.double()
    found = gpu.scaled_mm(kind, left.kept, right.kept, right.format, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def _straight(swizzled, x):
    rows, tiles = x.shape[0], x.shape[1] // 32
    r, s = torch.arange(rows)[:, None], torch.arange(tiles)[None, :]
    at = (r // 128 * (tiles // 4) + s // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + s % 4
    return swizzled.float()[at].repeat_interleave(32, 1)
