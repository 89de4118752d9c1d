"""Products against float64 ones of the decoded factors, within the rounding of FP32 sums."""

import math

import pytest
import torch

from rorqual.kernels.block_scaled import BlockScaled, block_starts, block_starts_on_device, quantize
from rorqual.kernels.number_formats import FP8_BLOCK, FP8_TILE, MXFP8, with_powers_of_two
from rorqual.kernels.scaled_linear import quantize_weight

V3 = (FP8_TILE, FP8_BLOCK, FP8_BLOCK)
UE8M0 = tuple(with_powers_of_two(f) for f in V3)
MX = (MXFP8, MXFP8, MXFP8.transposed)
EVERY = pytest.mark.parametrize("formats", [V3, UE8M0, MX], ids=["fp8", "ue8m0", "mxfp8"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 1), (5, 130, 7), (130, 300, 257), (256, 128, 128)])


@pytest.fixture(scope="session")
def gemm(device):
    from rorqual.kernels.triton import gemm

    return gemm


def magnitudes(*shape, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(shape) * torch.exp2(torch.randint(-8, 8, shape).float())
    x[..., -1, 0] = 1e4  # alone in its tile
    x[..., 0, :] = 0
    return x


def with_codes(x: BlockScaled, device, by_columns=False) -> BlockScaled:
    """As a GPU has it: codes, of a column side by side where the product runs over rows."""
    again = quantize(x.values, x.format, x.starts)  # values of the format round to themselves
    codes = again.codes.T.contiguous().T if by_columns else again.codes
    assert torch.equal(again.values, x.values)
    starts = None if x.starts is None else x.starts.to(device)
    return BlockScaled(x.format, x.shape, again.scales.to(device), starts, codes.to(device), None, x.every)


def exact(left, right):
    """The product, and what its sums may be off by: K · 2^-24 of the sum of magnitudes, and two roundings a term."""
    a, b = left.double(), right.double()
    return a @ b, (a.shape[1] + 2) * 2.0**-24 * (a.abs() @ b.abs())


def check(found, left, right):
    product, bound = exact(left, right)
    assert found.shape == product.shape
    assert ((found.cpu().double() - product).abs() <= bound).all()


@EVERY
@SHAPES
def test_output(gemm, device, formats, shape):
    M, K, N = shape
    x, w = quantize(magnitudes(M, K), formats[0]), quantize_weight(magnitudes(N, K, seed=1), formats[1])
    found = gemm.rows_product(with_codes(x, device), with_codes(w, device), 1, None, torch.float32, False)
    check(found, x.values, w.values.T)
    half = gemm.rows_product(with_codes(x, device), with_codes(w, device), 1, None, torch.bfloat16, False)
    assert half.dtype == torch.bfloat16
    step = 2.0**-8 if device.type == "cuda" else 2.0**-7  # the interpreter cuts numbers off
    torch.testing.assert_close(half.float(), found, rtol=step, atol=0)


@EVERY
@SHAPES
@pytest.mark.parametrize("by_columns", [False, True])
def test_input_gradient(gemm, device, formats, shape, by_columns):
    M, K, N = shape
    grad, w = quantize(magnitudes(M, N), formats[0]), quantize_weight(magnitudes(N, K, seed=1), formats[2])
    found = gemm.rows_product(with_codes(grad, device), with_codes(w, device, by_columns), 1, None, torch.float32, True)
    check(found, grad.values, w.values)


@EVERY
@SHAPES
@pytest.mark.parametrize("by_columns", [False, True])
def test_weight_gradient(gemm, device, formats, shape, by_columns):
    M, K, N = shape
    grad, x = (quantize(magnitudes(M, n, seed=n), formats[0].transposed) for n in (N, K))
    both = (with_codes(t, device, by_columns) for t in (grad, x))
    found = gemm.weight_gradient(*both, 1, None, torch.float32)
    check(found[0], grad.values.T, x.values)


@EVERY
@pytest.mark.parametrize("ends", [[0, 17, 17, 40, 300], [128, 256, 257], [0, 0, 5]])
@pytest.mark.parametrize(("width", "parts"), [(128, 1), (130, 1), (128, 2), (66, 2)])
def test_experts(gemm, device, formats, ends, width, parts):
    E, M, K, N = len(ends), ends[-1], 140, width * parts
    ends_ = torch.tensor(ends, dtype=torch.int32)
    x, weights = quantize(magnitudes(M, K), formats[0]), magnitudes(E, N, K, seed=1)
    w = quantize_weight(weights, formats[1], parts)
    found = gemm.rows_product(with_codes(x, device), with_codes(w, device), E, ends_.to(device), torch.float32, False)
    grad = quantize(magnitudes(M, N, seed=2), formats[0])
    turned = quantize_weight(weights, formats[2], parts)
    grad_x = None
    if not turned.every % 128 or parts == 1:  # else no tile of the gradient is one of the weight's
        both = with_codes(grad, device), with_codes(turned, device, True)
        grad_x = gemm.rows_product(*both, E, ends_.to(device), torch.float32, True)
    height = formats[0].tile[1]
    starts = block_starts(ends_, height)
    left, right = (quantize(t, formats[0].transposed, starts) for t in (magnitudes(M, N, seed=2), magnitudes(M, K)))
    both = (with_codes(t, device, True) for t in (left, right))
    grad_w = gemm.weight_gradient(*both, E, ends_.to(device), torch.float32)
    for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        rows, own = slice(first, last), slice(e * N, (e + 1) * N)
        check(found[rows], x.values[rows], w.values[own].T)
        if grad_x is not None:
            check(grad_x[rows], grad.values[rows], turned.values[own])
        check(grad_w[e], left.values[rows].T, right.values[rows])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(gemm, device, bad):
    x = magnitudes(6, 300)
    x[2, 130] = bad
    w = with_codes(quantize_weight(magnitudes(9, 300, seed=1) + 1, FP8_BLOCK), device)
    scaled = quantize(x, FP8_TILE)
    found = gemm.rows_product(
        BlockScaled(FP8_TILE, scaled.shape, scaled.scales.to(device), None, scaled.codes.to(device), None),
        w, 1, None, torch.float32, False,
    )  # fmt: skip
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("ends", [[0, 5, 5, 300], [128, 256], [0, 0], [7, 7, 7], [1, 2, 3, 259]])
@pytest.mark.parametrize("height", [32, 128])
def test_blocks_found_without_waiting_are_the_same_and_then_empty(ends, height):
    ends = torch.tensor(ends, dtype=torch.int32)
    right = block_starts(ends, height)
    found = block_starts_on_device(ends, height, int(ends[-1]))
    assert found.dtype == torch.int32
    assert torch.equal(found[: len(right)], right)
    assert (found[len(right) :] == ends[-1]).all()
