"""Normalisation and SwiGLU: values and gradients of the fast form and of the plain one."""

import pytest
import torch

from rorqual.kernels import cpu
from rorqual.kernels.accumulate import accumulate
from rorqual.kernels.norm import rms_norm, rms_norm_reference
from rorqual.kernels.swiglu import swiglu, swiglu_joined, swiglu_joined_reference, swiglu_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(ours, plain, *tensors, tolerance):
    results = []
    for function in (ours, plain):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, slope)))
    for mine, reference in zip(*results, strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 8)])
def test_rms_norm(dtype, shape):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape) + 1).to(dtype), torch.rand(shape[-1])
    before = x.clone()
    compare(lambda x, w: rms_norm(x, w, 0.1), lambda x, w: rms_norm_reference(x, w, 0.1), x, weight,
            tolerance=TOLERANCE[dtype])  # fmt: skip
    assert torch.equal(x, before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(2, 2, 5, 19)).to(dtype)
    compare(swiglu, swiglu_reference, gate, up, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_joined_swiglu(dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(10, 38)).to(dtype)
    compare(swiglu_joined, lambda x: swiglu_reference(*x.chunk(2, -1)), x, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_joined_swiglu_with_a_weight_for_each_row(dtype):
    torch.manual_seed(0)
    x, weights = (3 * torch.randn(10, 38)).to(dtype), torch.rand(10)
    weights[3] = 0.0

    def exact(x, weights):
        gate, up = x.double().chunk(2, -1)
        return (gate * gate.sigmoid() * up * weights.double().unsqueeze(1)).to(x.dtype)

    compare(swiglu_joined, exact, x, weights, tolerance=TOLERANCE[dtype])
    compare(swiglu_joined_reference, exact, x, weights, tolerance=3 * TOLERANCE[dtype])
    assert not swiglu_joined(x, weights)[3].any()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("view", [lambda x: x[..., 3:11], lambda x: x.transpose(0, 1)[..., :8], lambda x: x[0, 0, :8]])
def test_rows_at_any_distance(view):
    """Slices of wider tensors, as latent attention makes them, and gradients that are expanded scalars."""
    torch.manual_seed(0)
    weight = torch.rand(8)
    found = []
    for norm, act in ((rms_norm, swiglu), (rms_norm_reference, swiglu_reference)):
        x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = norm(view(x), weight, 1e-6), act(view(x), view(x))
        sum(o.sum() for o in out).backward()
        found.append((*out, x.grad))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_not_finite_stays_so(dtype):
    """A step whose loss or gradient is not finite must be seen to be."""
    x = torch.tensor([[1.0, float("nan"), 2.0, -100.0], [float("inf"), 1.0, 2.0, 3.0]], dtype=dtype)
    assert rms_norm(x[:1], torch.ones(4), 1e-6).isnan().all()
    out = swiglu(x, torch.ones_like(x))
    assert out.isnan().tolist() == [[False, True, False, False], [False] * 4]
    assert out[1, 0] == float("inf")


def test_add_into_keeps_what_bfloat16_would_lose():
    total, x = torch.full((1000,), 256.0), torch.full((1000,), 0.5, dtype=torch.bfloat16)
    accumulate(total, x)
    assert torch.equal(total, torch.full((1000,), 256.5))


def test_a_tensor_that_would_be_misread_is_refused():
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    with pytest.raises(TypeError, match=r"argument 6 is torch\.int64"):
        cpu.call("swiglu", x.dtype, x, 4, x, 4, 2, 4, out.long())
    with pytest.raises(TypeError, match="strides"):
        cpu.call("swiglu", x.dtype, x.T, 4, x, 4, 2, 4, out)
    with pytest.raises(ValueError, match="shorter"):
        cpu.call("swiglu", x.dtype, x, 4, x, 4, 2, 4)
