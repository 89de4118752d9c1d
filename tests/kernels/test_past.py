import pytest
import torch

from rorqual.kernels import past

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def masks(rows, places):
    """None, one for all, and one a row: row i sees its first i + 1 places."""
    by_row = torch.arange(places) <= torch.arange(rows)[:, None]
    return [None, (torch.arange(places) % 3 > 0)[None, None, None], by_row[:, None, None]]


def compare(function, reference, tensors, mask, tolerance):
    exact = reference(*(t.float() for t in tensors), mask, 0.3)
    with torch.no_grad():
        found = function(*tensors, mask, 0.3)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_latent_attention(dtype, which):
    torch.manual_seed(0)
    cache, rope = torch.randn(9, 40, 20).to(dtype), torch.randn(9, 40, 6).to(dtype)
    q, q_rope = torch.randn(7, 1, 3, 20).to(dtype), torch.randn(7, 1, 3, 6).to(dtype)
    tensors = q, q_rope, cache[:7, :25], rope[:7, :25]
    compare(past.latent_attention, past.latent_attention_reference, tensors, masks(7, 25)[which], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_attention(dtype, which, groups):
    torch.manual_seed(0)
    k, v = torch.randn(2, 9, 40, groups, 20).to(dtype)[:, :7, :25]
    q = torch.randn(7, 1, 6, 20).to(dtype)
    tolerance = TOLERANCE[dtype]
    compare(past.grouped_attention, past.grouped_attention_reference, (q, k, v), masks(7, 25)[which], tolerance)


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    k, v = torch.randn(2, 7, 25, 2, 20)
    q, mask = torch.randn(7, 1, 6, 20), masks(7, 25)[2]
    with torch.no_grad():
        together = past.grouped_attention(q, k, v, mask, 0.3)
        alone = [
            past.grouped_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1], 0.3) for i in range(7)
        ]
    assert torch.equal(together, torch.cat(alone))
