import pytest
import torch

from rorqual.kernels import rotary


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rows", [1, 3])  # of the table: one for all sequences, or one each
def test_as_the_reference_in_both_directions(dtype, tolerance, interleave, rows):
    torch.manual_seed(0)
    angles = 6 * torch.rand(rows, 5, 1, 20)
    table = angles.cos().to(dtype), angles.sin().to(dtype)
    x = torch.randn(3, 5, 2, 70).to(dtype).requires_grad_()  # more than is rotated, as latent attention has it
    part = x[..., 30:]
    found = rotary.apply_rotary(part, table, interleave)
    assert found.grad_fn.name().startswith("_Rotate")
    exact = rotary.apply_rotary_reference(part.float(), tuple(t.float() for t in table), interleave)
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)
    weights = torch.randn(exact.shape).to(dtype)
    (slope,), (right,) = (torch.autograd.grad(out, x, w) for out, w in ((found, weights), (exact, weights.float())))
    torch.testing.assert_close(slope, right, rtol=tolerance, atol=tolerance)
