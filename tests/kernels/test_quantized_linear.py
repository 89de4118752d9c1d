"""Packed weights: what is packed comes back, and the compiled products are the reference's."""

import pytest
import torch

from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import (
    FORMATS,
    GROUP,
    dequantize,
    pack,
    quantized_linear,
    quantized_linear_reference,
)

SHAPES = [(1, 16, 32), (1, 40, 96), (3, 33, 50), (2, 7, 5), (1, 24, 128), (1, 256, 576)]


def made(format, E, N, K, seed=0):
    """Packed weights, and the same as numbers."""
    generator = torch.Generator().manual_seed(seed)
    bits = 4 if format.startswith("int4") else 8
    q = torch.randint(0, 1 << bits, (E, N, K), generator=generator, dtype=torch.uint8)
    G = 1 if format == "int8" else -(-K // GROUP)
    scales = torch.rand(E, N, G, generator=generator).half() / 100
    minima = -torch.rand(E, N, G, generator=generator).half() / 20 if format == "int4_mins" else None
    wide = (lambda t: t.expand(E, N, K)) if G == 1 else lambda t: t.repeat_interleave(GROUP, 2)[..., :K]
    weights = (q.float() - (0 if format == "int4_mins" else 1 << (bits - 1))) * wide(scales.float())
    if minima is not None:
        weights = weights + wide(minima.float())
    return pack(format, q, scales.float(), minima), weights


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_packed_comes_back(format, shape):
    packed, weights = made(format, *shape)
    for e in range(shape[0]):
        assert torch.equal(dequantize(packed, e), weights[e])
    some = torch.tensor([shape[1] - 1, 0, shape[1] // 2])
    assert torch.equal(dequantize(packed, 0, some), weights[0][some])
    whole = 4.5 if packed.bits == 4 else 8.5
    size = shape[0] * -(-shape[1] // 16) * 16 * -(-shape[2] // 32) * 32 * whole / 8
    assert packed.data.nbytes <= size * (5 / 4.5 if format == "int4_mins" else 1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 70])
@pytest.mark.usefixtures("compiled")
@torch.no_grad()
def test_compiled_products_are_the_reference(format, shape, dtype, rows):
    E, N, K = shape
    packed, _ = made(format, *shape)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    x[0, 0] = 30.0  # one channel far above the rest
    bias = torch.randn(N, generator=generator).to(dtype)
    ends = torch.tensor([rows * (e + 1) // E for e in range(E)], dtype=torch.int32)
    if E > 1:
        ends[0] = 0  # an expert without rows
    ours = quantized_linear(x, packed, bias, ends)
    theirs = quantized_linear_reference(x, packed, bias, ends)
    # An activation halfway between two numbers may be rounded either way.
    scale = theirs.float().abs().max()
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=float(scale) * (2e-3 if K > 32 else 2e-2))
    assert ((ours.float() - theirs.float()).abs().mean() / scale) < 2e-3


@pytest.mark.parametrize(("format", "most"), [("int8", 0.025), ("int8_groups", 0.015)])
@torch.no_grad()
def test_rounding_of_activations_costs_little(format, most):
    packed, weights = made(format, 1, 64, 512)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 100
    exact = x @ weights[0].T
    error = (quantized_linear(x, packed) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (1e-3 if format == "int8" and cpu.has_matrix_unit() else most)


@pytest.mark.skipif(cpu.capability() is None, reason="PyTorch's products, in the reference, differ in the last bit")
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(format):
    packed, _ = made(format, 1, 112, 160)
    x = torch.randn(203, 160, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([quantized_linear(row, packed) for row in x.split(1)])
    assert torch.equal(quantized_linear(x, packed), alone)
    assert torch.equal(torch.cat([quantized_linear(some, packed) for some in x.split(9)]), alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_number_that_is_none_spoils_its_row_and_no_other(bad):
    packed, _ = made("int4", 1, 16, 96)
    x = torch.ones(3, 96)
    x[1, 40] = bad
    found = quantized_linear(x, packed)
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()
    assert quantized_linear(torch.zeros(1, 96), packed).eq(0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
@torch.no_grad()
def test_numbers_too_small_for_a_scale_are_zeros(format, sign):
    """127 divided by the largest of them is infinite, of which processors make different integers."""
    packed, _ = made(format, 1, 16, 96)
    x = torch.ones(2, 96)
    x[0] = sign * 1e-38
    assert quantized_linear(x, packed)[0].eq(0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)], ids=["plus", "mixed", "minus"])
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.usefixtures("compiled")
@torch.no_grad()
def test_sums_of_the_largest_numbers_fit(format, signs, rows):
    """Without int8 dot products sums of a few products are kept in 16 bits."""
    N, K = 32, 96
    most = 15 if format.startswith("int4") else 255
    q = torch.full((1, N, K), most, dtype=torch.uint8)
    q[:, N // 2 :] = 0
    G = 1 if format == "int8" else K // GROUP
    minima = torch.zeros(1, N, G) if format == "int4_mins" else None
    packed = pack(format, q, torch.ones(1, N, G), minima)
    x = torch.tensor(signs, dtype=torch.float32).repeat(rows, K // 2)
    ends = torch.tensor([rows], dtype=torch.int32)
    expected = quantized_linear_reference(x, packed, None, ends)
    torch.testing.assert_close(quantized_linear(x, packed), expected, rtol=1e-6, atol=0)
