import pytest
import torch

from helpers import shape_checks
from rorqual.kernels import cpu, linear

needs_dot_products = pytest.mark.skipif(not cpu.has_dot_products(), reason="no BF16 dot products, or no compiler")
SHAPES = [(1, 64, 32), (5, 34, 50), (12, 576, 192), (13, 98, 34), (100, 130, 66)]


def close(found, exact):
    """Within BF16's rounding of the result and of the sums on the way."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert (found.float() - exact).abs().max() <= exact.abs().max() * 2**-8


@needs_dot_products
@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows(rows, width, outputs, biased, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, width).bfloat16(), torch.randn(outputs, width).bfloat16()
    bias = 10 * torch.randn(outputs).bfloat16() if biased else None
    monkeypatch.setattr(linear, "linear_reference", None)  # not what is tested
    with torch.no_grad():
        found = linear.linear(x, weight, bias)
    close(found, x.float() @ weight.float().T + (bias.float() if biased else 0.0))


@needs_dot_products
def test_rows_apart_and_nothing_else_is_written(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 3, 64).bfloat16()[:, 1], torch.randn(40, 64).bfloat16()
    monkeypatch.setattr(linear, "linear_reference", None)
    room = torch.full((9, 40), 7.0).bfloat16()
    ends = torch.tensor([7], dtype=torch.int32)
    cpu.call("grouped_gemm", x.dtype, x, x.stride(0), weight, None, ends, 1, 40, 64, room[1:8])
    close(room[1:8], x.float() @ weight.float().T)
    assert torch.equal(room[[0, 8]], torch.full((2, 40), 7.0).bfloat16())


@needs_dot_products
@pytest.mark.parametrize(("width", "outputs"), [(48, 40), (34, 66), (128, 192)])
def test_grouped_and_its_derivatives(width, outputs, monkeypatch):
    torch.manual_seed(0)
    ends = torch.tensor([13, 13, 14, 49, 50], dtype=torch.int32)  # the second expert has no rows, others odd numbers
    x, weight = torch.randn(50, width).bfloat16(), torch.randn(5, outputs, width).bfloat16()
    slope = torch.randn(50, outputs).bfloat16()
    exact = [t.float().requires_grad_() for t in (x, weight)]
    expert = torch.bucketize(torch.arange(50), ends, right=True)
    right = torch.einsum("mk,mnk->mn", exact[0], exact[1][expert])
    monkeypatch.setattr(linear, "grouped_linear_reference", None)
    monkeypatch.setattr(linear, "_has_amx", lambda: False)  # where there is, oneDNN's would be taken
    found = linear.grouped_linear(x.requires_grad_(), weight.requires_grad_(), ends)
    close(found, right)
    grads = torch.autograd.grad(found, (x, weight), slope)
    for mine, theirs in zip(grads, torch.autograd.grad(right, exact, slope.float()), strict=True):
        close(mine, theirs)
    assert not grads[1][1].any()


@needs_dot_products
def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, weight = torch.randn(29, 576).bfloat16(), torch.randn(192, 576).bfloat16()
    with torch.no_grad():
        together = linear.linear(x, weight)
        assert torch.equal(together, torch.cat([linear.linear(row, weight) for row in x.split(1)]))


vectors = pytest.mark.skipif(cpu.capability() != "avx2", reason="FP32 products are for AVX2")
FP32_SHAPES = [(1, 64, 32), (2, 7, 5), (3, 577, 192), (17, 98, 35), (48, 16, 1), (49, 576, 192), (256, 33, 70)]


@vectors
@pytest.mark.parametrize(("rows", "width", "outputs"), FP32_SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_fp32_without_a_derivative(rows, width, outputs, biased, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 2, width)[:, 1:], torch.randn(outputs, width)
    bias = 10 * torch.randn(outputs) if biased else None
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    monkeypatch.setattr(linear, "linear_reference", None)
    found = linear.linear(x, weight, bias)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= 1e-6 * width**0.5 * 10


@vectors
@torch.no_grad()
def test_few_fp32_rows_do_not_depend_on_their_neighbours_and_nothing_else_is_written():
    torch.manual_seed(0)
    x, weight = torch.randn(29, 70), torch.randn(39, 70)
    together = linear.linear(x, weight)
    assert torch.equal(together, torch.cat([linear.linear(row, weight) for row in x.split(1)]))
    room, ends = torch.full((31, 39), 7.0), torch.tensor([29], dtype=torch.int32)
    cpu.call("grouped_gemm", x.dtype, x, x.stride(0), weight, None, ends, 1, 39, 70, room[1:30])
    assert torch.equal(room[1:30], together)
    assert torch.equal(room[[0, 30]], torch.full((2, 39), 7.0))


@vectors
@torch.no_grad()
def test_fp32_experts_with_few_rows(monkeypatch):
    torch.manual_seed(0)
    ends = torch.tensor([13, 13, 14, 49, 50], dtype=torch.int32)
    x, weight = torch.randn(50, 34), torch.randn(5, 22, 34)
    expert = torch.bucketize(torch.arange(50), ends, right=True)
    monkeypatch.setattr(linear, "grouped_linear_reference", None)
    found = linear.grouped_linear(x, weight, ends)
    torch.testing.assert_close(found, torch.einsum("mk,mnk->mn", x, weight[expert]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_otherwise_as_torch_has_it(dtype):
    """With a derivative, and in BF16 of an odd width."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4, 7).to(dtype), torch.randn(5, 7).to(dtype), torch.randn(5).to(dtype)
    assert torch.equal(linear.linear(x, weight, bias), linear.linear_reference(x, weight, bias))
    if dtype is torch.bfloat16:
        with torch.no_grad():
            assert torch.equal(linear.linear(x, weight, bias), linear.linear_reference(x, weight, bias))


@torch.no_grad()
def test_no_rows_and_shapes_that_do_not_fit():
    weight = torch.ones(6, 8, dtype=torch.bfloat16)
    assert linear.linear(torch.ones(2, 0, 8, dtype=torch.bfloat16), weight).shape == (2, 0, 6)
    with shape_checks.off(), pytest.raises(RuntimeError):
        linear.linear(torch.ones(3, 4, dtype=torch.bfloat16), weight)
    with shape_checks.off(), pytest.raises(RuntimeError):
        linear.linear(torch.ones(3, 8, dtype=torch.bfloat16), weight, torch.ones(2, dtype=torch.bfloat16))
    with shape_checks.off(), pytest.raises(RuntimeError):
        linear.grouped_linear(torch.ones(3, 8, dtype=torch.bfloat16), weight[None], torch.tensor([1, 3]).int())


@pytest.mark.parametrize(("width", "outputs"), [(48, 40), (34, 66)])
def test_the_reference_takes_every_width(width, outputs):
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x, weight = torch.randn(7, width).bfloat16(), torch.randn(3, outputs, width).bfloat16()
    expert = torch.bucketize(torch.arange(7), ends, right=True)
    exact = torch.einsum("mk,mnk->mn", x.float(), weight.float()[expert])
    close(linear.grouped_linear_reference(x, weight, ends), exact)


def test_frozen_experts_get_no_gradient():
    x = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    linear.grouped_linear(x, torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.tensor([3]).int()).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0).bfloat16())


def test_weights_learn():
    weight = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    linear.linear(torch.ones(3, 4, dtype=torch.bfloat16), weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 4), 3.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_linear_is_linear_in_fp32(dtype):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(7, 24).to(dtype), torch.randn(5, 24), torch.randn(7, 5)
    found = [t.clone().requires_grad_() for t in (x, weight)]
    right = [t.clone().requires_grad_() for t in (x, weight)]
    y, exact = linear.fp32_linear(*found), torch.nn.functional.linear(right[0].float(), right[1])
    assert torch.equal(y, exact)
    y.backward(grad)
    exact.backward(grad)
    for mine, its in zip(found, right, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
