import pytest
import torch

from helpers import shape_checks
from rorqual.kernels import paged_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = torch.tensor([1, 16, 17, 25, 40, 63, 64], dtype=torch.int32)  # within a block, full, one beyond, long


def tables():
    """Every row's blocks lie scattered; row 1 shares its first with row 0, and what a row does not need is block 0."""
    generator = torch.Generator().manual_seed(5)
    blocks = (torch.randperm(28, generator=generator) + 1).view(7, 4)
    blocks[1, 0] = blocks[0, 0]
    needed = torch.arange(4) * 16 < LENGTHS[:, None]
    return torch.where(needed, blocks, 0).to(torch.int32)


def compare(function, reference, tensors, tolerance):
    exact = reference(*(t.float() for t in tensors), tables(), LENGTHS, 0.3)
    with torch.no_grad():
        found = function(*tensors, tables(), LENGTHS, 0.3)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_latent_attention(dtype):
    torch.manual_seed(0)
    latent, rope = torch.randn(29, 16, 20).to(dtype), torch.randn(29, 16, 6).to(dtype)
    q, q_rope = torch.randn(7, 3, 20).to(dtype), torch.randn(7, 3, 6).to(dtype)
    tensors = q, q_rope, latent, rope
    compare(paged_attention.latent_attention, paged_attention.latent_attention_reference, tensors, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("width", [20, 64, 80])
def test_grouped_attention(dtype, groups, width):
    torch.manual_seed(0)
    k, v = torch.randn(2, 29, 16, groups, width).to(dtype)
    q = torch.randn(7, 6, width).to(dtype)
    compare(paged_attention.grouped_attention, paged_attention.grouped_attention_reference, (q, k, v), TOLERANCE[dtype])


def test_the_reference_is_softmax_attention_over_the_places_of_a_row():
    torch.manual_seed(0)
    k, v = torch.randn(2, 29, 16, 2, 8)
    q = torch.randn(7, 4, 8)
    found = paged_attention.grouped_attention_reference(q, k, v, tables(), LENGTHS, 0.3)
    for i, length in enumerate(LENGTHS.tolist()):
        keys, values = (x[tables()[i].long()].flatten(0, 1)[:length] for x in (k, v))
        for h in range(4):
            weights = (keys[:, h // 2] @ q[i, h] * 0.3).softmax(0)
            torch.testing.assert_close(found[i, h], weights @ values[:, h // 2])


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    k, v = torch.randn(2, 29, 16, 2, 20)
    q = torch.randn(7, 6, 20)
    with torch.no_grad():
        together = paged_attention.grouped_attention(q, k, v, tables(), LENGTHS, 0.3)
        rows = [slice(i, i + 1) for i in range(7)]
        alone = [paged_attention.grouped_attention(q[i], k, v, tables()[i], LENGTHS[i], 0.3) for i in rows]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_what_another_sequence_left_in_a_slot_does_not_matter(suffix):
    torch.manual_seed(0)
    k, v, latent, rope = (torch.randn(29, 16, *shape) for shape in ((2, 20), (2, 20), (20,), (6,)))
    q, q_latent, q_rope = torch.randn(7, 6, 20), torch.randn(7, 3, 20), torch.randn(7, 3, 6)
    seen = torch.zeros(29, 16, dtype=torch.bool)
    for table, length in zip(tables().tolist(), LENGTHS.tolist(), strict=True):
        for s in range(length):
            seen[table[s // 16], s % 16] = True

    def outputs():
        with torch.no_grad():
            grouped = getattr(paged_attention, f"grouped_attention{suffix}")(q, k, v, tables(), LENGTHS, 0.3)
            args = q_latent, q_rope, latent, rope
            return grouped, getattr(paged_attention, f"latent_attention{suffix}")(*args, tables(), LENGTHS, 0.3)

    before = outputs()
    for store in (k, v, latent, rope):
        store[~seen] = torch.nan
    torch.testing.assert_close(outputs(), before, rtol=0, atol=0)


def test_wrong_shapes_are_refused():
    k = torch.randn(29, 16, 2, 20)
    with shape_checks.off(), torch.no_grad(), pytest.raises(ValueError, match="tables"):
        paged_attention.grouped_attention(torch.randn(6, 6, 20), k, k, tables(), LENGTHS, 0.3)
