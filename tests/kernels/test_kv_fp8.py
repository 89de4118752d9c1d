import pytest
import torch

from rorqual.kernels import cpu, kv_fp8, paged_attention

LENGTHS = torch.tensor([1, 16, 17, 25, 40, 63, 64], dtype=torch.int32)


def stored(x, function=kv_fp8.store_fp8):
    """Rows [N, G, W] through a store whose slots are in another order."""
    slots = (torch.arange(len(x)) * 7 + 3) % (16 * -(-len(x) // 16) + 1)
    store = torch.zeros(-(-len(x) // 16) + 1, 16, x.shape[1], kv_fp8.row_bytes(x.shape[2]), dtype=torch.uint8)
    function(store, slots, x)
    return store.flatten(0, 1)[slots]


def codes(x):
    """E4M3 of floats within ±448, from its definition: the nearest of the 127 magnitudes, ties to an even code."""
    magnitudes = torch.tensor([m * 2.0**-9 if m < 8 else (8 + m % 8) * 2.0 ** (m // 8 - 10) for m in range(127)])
    distance = (x.double().abs().unsqueeze(-1) - magnitudes.double()).abs()
    nearest = distance.min(-1, keepdim=True).values == distance
    even = nearest & (torch.arange(127) % 2 == 0)
    code = torch.where(even.any(-1), even.int().argmax(-1), nearest.int().argmax(-1))
    return (code | (torch.signbit(x).int() << 7)).to(torch.uint8)


def every_code():
    """A row for each finite code, with ±448 in its tile: the scale is 1."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    row = torch.full((len(values), 1, 3), 448.0)
    row[:, 0, 1] = values
    return row


@pytest.mark.parametrize("function", [kv_fp8.store_fp8, kv_fp8.store_fp8_reference])
def test_bits_are_those_of_torchs_cast(function):
    x = every_code()
    rows = stored(x, function)
    assert torch.equal(rows[:, 0, :3], x[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(kv_fp8.dequantize(rows, 3), x)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 100, generator=generator) * torch.logspace(-4, 2, 100)
    x[:, 0, 50:] = (x[:, 0, 50:] * 32).round() / 32  # ties
    x[:, 0, 0] = 448.0
    x = x.clamp(-448, 448)
    rows = stored(x, function)[:, 0]
    assert torch.equal(rows[:, 100:].contiguous().view(torch.float32), torch.ones(4000, 1))
    assert torch.equal(rows[:, :100], x[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(rows[:50, :100], codes(x[:50, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 6, 16, 64, 100, 128, 130, 200, 512])
def test_compiled_and_reference_agree_to_the_bit(compiled, width, dtype):
    torch.manual_seed(0)
    x = (torch.randn(64, 2, width) * torch.logspace(-30, 30, 64).view(-1, 1, 1)).to(dtype)
    x[0], x[1, 0], x[2, 0, -1] = 0.0, -0.0, 1e30
    x[3] = 1e-45
    x[4, 1, 0], x[5, 0, -1], x[6, 1, -1] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(stored(x), stored(x, kv_fp8.store_fp8_reference))


def test_numbers_come_back_within_three_bits():
    torch.manual_seed(0)
    x = torch.randn(50, 3, 300) * torch.logspace(-20, 20, 50).view(-1, 1, 1)
    found = kv_fp8.dequantize(stored(x), 300)
    tiles = torch.nn.functional.pad(x, (0, 84)).unflatten(-1, (3, 128)).abs().amax(-1)
    least = (tiles / 448 * 2**-10).repeat_interleave(128, -1)[..., :300]  # half a step of the smallest numbers
    assert ((found - x).abs() <= torch.maximum(x.abs() / 16 * 1.001, least)).all()
    largest = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, largest), x.gather(-1, largest), rtol=1e-6, atol=0)


def test_an_outlier_costs_the_others_nothing():
    """K projections of some models have channels a hundred times the rest; int8 would keep one bit of the others."""
    torch.manual_seed(0)
    x = torch.randn(50, 1, 64)
    plain = kv_fp8.dequantize(stored(x), 64)
    x[..., 5] = 200.0
    found = kv_fp8.dequantize(stored(x), 64)
    rest = torch.arange(64) != 5
    error, own = ((y - x)[..., rest].norm() / x[..., rest].norm() for y in (found, plain))
    assert error < 1.1 * own < 0.04


def test_what_is_no_number_stays_none_in_its_tile():
    x = torch.ones(1, 1, 200)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x[0, 0, 3] = wrong
        for function in (kv_fp8.store_fp8, kv_fp8.store_fp8_reference):
            (found,) = kv_fp8.dequantize(stored(x, function), 200)[0]
            assert found[:128].isnan().all()
            assert torch.equal(found[128:], torch.ones(72))


def test_bytes_of_a_row():
    assert kv_fp8.row_bytes(512) == 512 + 4 * 4
    assert kv_fp8.row_bytes(64) == 64 + 4
    assert kv_fp8.row_bytes(130) == 132 + 2 * 4


def tables():
    generator = torch.Generator().manual_seed(5)
    blocks = (torch.randperm(28, generator=generator) + 1).view(7, 4)
    blocks[1, 0] = blocks[0, 0]
    return torch.where(torch.arange(4) * 16 < LENGTHS[:, None], blocks, 0).to(torch.int32)


def quantized(*shape):
    """A store of random rows at several scales, and its values in float64; what no row sees is NaN."""
    x = torch.randn(29, 16, *shape) * torch.logspace(-1, 1, 16).view(16, *[1] * len(shape))
    store = kv_fp8.quantize(x)
    seen = torch.zeros(29, 16, dtype=torch.bool)
    for table, length in zip(tables().tolist(), LENGTHS.tolist(), strict=True):
        for s in range(length):
            seen[table[s // 16], s % 16] = True
    store[~seen] = 255
    return store, kv_fp8.dequantize(store, shape[-1]).double()


def close(found, expected):
    error = (found.double() - expected).norm() / expected.norm()
    bfloat16 = 5e-3 if cpu.capability() else 1e-2  # the reference rounds the weights too
    assert error < (1e-6 if found.dtype is torch.float32 else bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("width", [20, 64, 80, 256])
def test_grouped_attention_is_that_of_the_dequantised_values(dtype, groups, width):
    torch.manual_seed(0)
    (k, keys), (v, values) = quantized(groups, width), quantized(groups, width)
    q = torch.randn(7, 6, width).to(dtype)
    with torch.no_grad():
        found = paged_attention.grouped_attention(q, k, v, tables(), LENGTHS, 0.1)
    expected = torch.empty(7, 6, width, dtype=torch.float64)
    for i, length in enumerate(LENGTHS.tolist()):
        own_keys, own_values = (x[tables()[i].long()].flatten(0, 1)[:length] for x in (keys, values))
        for h in range(6):
            g = h * groups // 6
            weights = (own_keys[:, g] @ q[i, h].double() * 0.1).softmax(0)
            expected[i, h] = weights @ own_values[:, g]
    close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("latent", "rope"), [(16, 4), (130, 6), (512, 64)])
def test_latent_attention_is_that_of_the_dequantised_values(dtype, latent, rope):
    torch.manual_seed(0)
    store, latents = quantized(latent)
    k_rope = torch.randn(29, 16, rope).bfloat16()
    q, q_rope = torch.randn(7, 5, latent).to(dtype), torch.randn(7, 5, rope).to(dtype)
    with torch.no_grad():
        found = paged_attention.latent_attention(q, q_rope, store, k_rope, tables(), LENGTHS, 0.05)
    expected = torch.empty(7, 5, latent, dtype=torch.float64)
    for i, length in enumerate(LENGTHS.tolist()):
        own, own_rope = (x[tables()[i].long()].flatten(0, 1)[:length].double() for x in (latents, k_rope))
        scores = q[i].double() @ own.T + q_rope[i].double() @ own_rope.T
        expected[i] = (scores * 0.05).softmax(-1) @ own
    close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_references_agree(dtype):
    torch.manual_seed(0)
    k, v, latent = (kv_fp8.quantize(torch.randn(29, 16, *shape)) for shape in ((2, 80), (2, 80), (130,)))
    k_rope = torch.randn(29, 16, 6).bfloat16()
    q, q_rope, q_latent = (torch.randn(7, 6, width).to(dtype) for width in (80, 6, 130))
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for name, tensors in (("grouped_attention", (q, k, v)), ("latent_attention", (q_latent, q_rope, latent, k_rope))):
        with torch.no_grad():
            found = getattr(paged_attention, name)(*tensors, tables(), LENGTHS, 0.1)
        expected = getattr(paged_attention, f"{name}_reference")(*tensors, tables(), LENGTHS, 0.1)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
