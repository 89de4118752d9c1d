"""Normalisation and SwiGLU: values and gradients of the fast form and of the plain one."""

import pytest
import torch

from rorqual.kernels.norm import rms_norm, rms_norm_reference
from rorqual.kernels.swiglu import swiglu, swiglu_reference

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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 8)])
def test_rms_norm(dtype, shape):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape) + 1).to(dtype), torch.rand(shape[-1])
    before = x.clone()
    compare(lambda x, w: rms_norm(x, w, 0.1), lambda x, w: rms_norm_reference(x, w, 0.1), x, weight,
            tolerance=TOLERANCE[dtype])  # fmt: skip
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    torch.manual_seed(0)
    compare(swiglu, swiglu_reference, (3 * torch.randn(2, 5, 12)).to(dtype), tolerance=TOLERANCE[dtype])
