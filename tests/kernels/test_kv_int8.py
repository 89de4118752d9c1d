import pytest
import torch

from rorqual.kernels import kv_int8


def stores(blocks, groups, width):
    return tuple(torch.zeros(blocks, groups, -(-width // 32), kv_int8.RECORD, dtype=torch.uint8) for _ in range(2))


def unpacked(keys, values, width):
    """By place."""
    return kv_int8.dequantize_keys(keys, width).flatten(0, 1), kv_int8.dequantize_values(values, width).flatten(0, 1)


@pytest.mark.parametrize("width", [16, 20, 32, 64, 80])
@pytest.mark.parametrize("groups", [1, 3])
def test_numbers_come_back_within_half_a_step_of_their_32(width, groups):
    torch.manual_seed(0)
    kept = stores(5, groups, width)
    index = torch.tensor([0, 15, 16, 40, 79, 33])
    new = torch.randn(2, 6, groups, width) * torch.logspace(-3, 3, 6).view(6, 1, 1)
    new[:, 5] = 0.0
    kv_int8.store_int8(*kept, index, *new)
    for x, found in zip(new, unpacked(*kept, width), strict=True):
        padded = torch.nn.functional.pad(x, (0, -width % 32)).unflatten(-1, (-1, 32))
        half = (padded.abs().amax(-1, keepdim=True) / 254).expand_as(padded).flatten(-2)[..., :width]
        of_the_scale = 127 * (half / 1024 + 2**-25)  # which is FP16
        assert ((found[index] - x).abs() <= 1.001 * half + of_the_scale).all()
        assert not found[index[:5]].eq(0).all()
        untouched = torch.ones(80, dtype=torch.bool)
        untouched[index] = False
        assert not found[untouched].any()


def test_a_place_is_written_over():
    kept = stores(1, 2, 40)
    for factor in (3.0, -1.0):
        kv_int8.store_int8(*kept, torch.tensor([7]), *(factor * torch.ones(2, 1, 2, 40)))
    for found in unpacked(*kept, 40):
        torch.testing.assert_close(found[7], -torch.ones(2, 40), rtol=1e-3, atol=0)


def test_what_is_no_number_stays_none():
    kept = stores(1, 1, 64)
    k = torch.ones(1, 1, 64)
    k[0, 0, 3] = torch.nan
    kv_int8.store_int8(*kept, torch.tensor([2]), k, k)
    for found in unpacked(*kept, 64):
        assert found[2, 0, :32].isnan().all()
        torch.testing.assert_close(found[2, 0, 32:], torch.ones(32), rtol=1e-3, atol=0)
