"""AdamW with moments in BF16 and in 8 bits: one step against float64, rounding, and the compiled form."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rorqual.kernels.adamw import (
    BLOCK,
    Coefficients,
    adamw_8bit,
    adamw_8bit_reference,
    adamw_bfloat16,
    adamw_bfloat16_reference,
    dequantize,
    first_table,
    moment_dtype,
    quantize,
    second_table,
)

LR, BETAS, DECAY, EPS = 1e-2, (0.9, 0.95), 0.1, 1e-8
CPU = torch.device("cpu")
SIZES = [1, 255, 256, 1000, 4099]


def coefficients(steps: int = 3) -> Coefficients:
    return Coefficients.of(LR, BETAS, DECAY, EPS, steps)


def operands(size: int) -> tuple[torch.Tensor, ...]:
    """Weight, gradient and moments as they are after some steps: magnitudes over six decades."""
    generator = torch.Generator().manual_seed(size)
    wide = 10 ** (torch.rand(size, generator=generator) * 6 - 8)
    weight, grad, first = (torch.randn(size, generator=generator) for _ in range(3))
    return weight, grad * wide, first * wide * 0.3, (wide * torch.rand(size, generator=generator)).square() * 0.5


def expected(weight, grad, first, second, steps):
    """The textbook's step (Loshchilov and Hutter, 1711.05101) in float64."""
    w, g, m, v = (x.double().numpy() for x in (weight, grad, first, second))
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g**2
    corrected = m / (1 - BETAS[0] ** steps), v / (1 - BETAS[1] ** steps)
    return w - LR * DECAY * w - LR * corrected[0] / (np.sqrt(corrected[1]) + EPS), m, v


@pytest.mark.parametrize("step", [adamw_bfloat16, adamw_bfloat16_reference])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_in_bfloat16(step, size):
    weight, grad, first, second = operands(size)
    first, second = first.bfloat16(), second.bfloat16()
    w, m, v = expected(weight, grad, first, second, 3)
    step(weight, grad, first, second, coefficients())
    np.testing.assert_allclose(weight, w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first.float(), m, rtol=2**-8, atol=1e-12)
    np.testing.assert_allclose(second.float(), v, rtol=2**-8, atol=1e-20)


@pytest.mark.parametrize("step", [adamw_8bit, adamw_8bit_reference])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_in_8_bits(step, size):
    weight, grad, first, second = operands(size)
    (a, a_scale), (b, b_scale) = quantize(first, signed=True), quantize(second, signed=False)
    stored = dequantize(a, a_scale, first_table(CPU)), dequantize(b, b_scale, second_table(CPU))
    w, m, v = expected(weight, grad, *stored, 3)
    step(weight, grad, a, b, a_scale, b_scale, coefficients())
    np.testing.assert_allclose(weight, w, rtol=1e-5, atol=1e-6)
    for codes, scale, table, exact in ((a, a_scale, first_table, m), (b, b_scale, second_table, v)):
        tops = [np.abs(exact[i : i + BLOCK]).max() for i in range(0, size, BLOCK)]
        np.testing.assert_allclose(scale, tops, rtol=1e-5)
        found = dequantize(codes, scale, table(CPU)).double().numpy()
        check_error(found, exact, np.repeat(tops, BLOCK)[:size], 64 if table is first_table else 128)


def check_error(found, exact, top, cells):
    """Half a cell of the highest decade, each lower decade with half as many cells; and the smallest magnitude."""
    share = np.abs(exact) / top
    decade = np.clip(np.floor(-np.log10(np.maximum(share, 1e-12)) + 1e-6), 0, 7)
    bound = 0.45 / cells * 2**decade * 10**-decade + 6e-7
    assert (np.abs(found - exact) <= top * bound * 1.01).all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("key", [None, 0, 3_000_000_000])
@pytest.mark.parametrize("size", SIZES)
def test_compiled_bfloat16_is_the_reference(size, key):
    weight, grad, first, second = operands(size)
    found = []
    for step in (adamw_bfloat16, adamw_bfloat16_reference):
        state = weight.clone(), first.bfloat16(), second.bfloat16()
        for count in (1, 2):
            step(state[0], grad, *state[1:], coefficients(count), key)
        found.append(state)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for mine, reference in zip(found[0][1:], found[1][1:], strict=True):
        # An FP32 rounding may decide a BF16 one, rarely.
        assert (mine != reference).float().mean() <= 0.01
        torch.testing.assert_close(mine, reference, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", SIZES)
def test_compiled_8_bits_are_the_references(size):
    weight, grad, first, second = operands(size)
    found = []
    for step in (adamw_8bit, adamw_8bit_reference):
        (a, a_scale), (b, b_scale) = quantize(first, signed=True), quantize(second, signed=False)
        state = weight.clone(), a, b, a_scale, b_scale
        step(state[0], grad, *state[1:], coefficients())
        found.append(state)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for at in (1, 2):
        mine, reference = (state[at].int() for state in found)
        assert (mine != reference).float().mean() <= 0.01
        assert (mine - reference).abs().max() <= 1
    for at in (3, 4):
        torch.testing.assert_close(found[0][at], found[1][at], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("compiled")
def test_every_code_is_kept_by_the_compiled_form():
    """With β = 1 − 2⁻²⁴ and no gradient a moment stays what it is, so each code must come back, also -1, 0 and 1."""
    still = Coefficients(0.0, 0.0, 1.0, 0.0, 1.0, 1e-8)
    codes = torch.arange(256, dtype=torch.uint8)
    for scale in (1.0, 3e-5, 7e6):
        first, second = codes.clone(), codes.clone()
        scales = torch.tensor([scale]), torch.tensor([scale])
        adamw_8bit(torch.zeros(256), torch.zeros(256), first, second, *scales, still)
        assert torch.equal(first, codes)
        assert torch.equal(second, codes)
        assert scales == (torch.tensor([scale]), torch.tensor([scale]))


def test_tables():
    first, second = first_table(CPU), second_table(CPU)
    for table in (first, second):
        assert len(table) == 256
        assert (table.diff() > 0).all()
        assert table[-1] == 1
    assert first[127] == 0
    assert torch.equal(-first[:127].flip(0), first[128:255])
    assert 0 < second[0] < 1e-7
    assert first[128].item() == pytest.approx(5.5e-7)  # the middle of 1e-7 … 1e-6


def test_every_code_is_its_own_numbers_code():
    for table, signed in ((first_table(CPU), True), (second_table(CPU), False)):
        codes, scale = quantize(table * 3, signed)
        assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
        assert scale.tolist() == [3]


@pytest.mark.parametrize("step", [adamw_8bit, adamw_8bit_reference])
def test_a_second_moment_too_small_for_its_block_does_not_blow_up_the_update(step):
    """One large gradient makes the others' second moments 1e-14 of the block's largest, and then they have none."""
    weight = torch.zeros(2 * BLOCK)
    grad = torch.zeros(2 * BLOCK)
    grad[:BLOCK] = 1e-5
    grad[0] = 100.0  # and the second block is zeros
    a, b = torch.zeros(2, 2 * BLOCK, dtype=torch.uint8)
    scales = torch.zeros(2), torch.zeros(2)
    for steps in range(1, 60):
        before = weight.clone()
        step(weight, grad, a, b, *scales, Coefficients.of(LR, BETAS, 0.0, EPS, steps))
        assert (weight - before).abs().max() <= 2 * LR  # Adam's own bound here is lr
        if steps == 5:
            grad[1:] = 0
    assert not weight[BLOCK:].any()
    assert scales[0][1] == scales[1][1] == 0
    assert weight.isfinite().all()


@pytest.mark.parametrize("step", [adamw_bfloat16, adamw_bfloat16_reference])
def test_rounding_by_chance_is_unbiased_and_reproducible(step):
    """Of 1 + 2⁻⁹, a quarter of the distance between BF16 numbers, a quarter are rounded up."""
    size, means, draws = 20_000, [], []
    for key in range(8):
        first = torch.full((size,), 1.0, dtype=torch.bfloat16)
        second, again = first.clone(), first.clone()
        grad = torch.full((size,), 1 + 2**-7)
        hold = Coefficients(0.25, 0.0, 1.0, 0.0, 1.0, 1e-8)
        step(torch.zeros(size), grad, first, second, hold, key)
        step(torch.zeros(size), grad, again, second.clone(), hold, key)
        assert torch.equal(first, again)
        assert set(first.tolist()) == {1.0, 1 + 2**-7}
        assert (second == 1).all()  # what needs no rounding is not rounded
        draws.append(first)
        means.append((first.float() - 1).mean().item() / 2**-7)
    assert np.mean(means) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / size / 8) ** 0.5)
    # Other keys, other numbers: two draws agree as often as independent ones do.
    agree = np.mean([(a == b).float().mean().item() for a, b in pairwise(draws)])
    assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.01)


def test_rounding_by_chance_lets_a_slow_average_move():
    """β₂ = 0.999 takes a thousandth a step, which rounding to nearest always undoes."""
    decay = Coefficients(0.0, 0.001, 1.0, 0.0, 1.0, 1e-8)
    nearest, chance = (torch.ones(4096, dtype=torch.bfloat16) for _ in range(2))
    zeros = torch.zeros(4096)
    for key in range(100):
        adamw_bfloat16(zeros.clone(), zeros, torch.zeros_like(nearest), nearest, decay)
        adamw_bfloat16(zeros.clone(), zeros, torch.zeros_like(chance), chance, decay, key)
    assert (nearest == 1).all()
    assert chance.float().mean().item() == pytest.approx(0.999**100, abs=0.002)


def test_what_is_stored_how():
    assert moment_dtype("float32", 10**6) is torch.float32
    assert moment_dtype("bfloat16", 8) is torch.bfloat16
    assert moment_dtype("8bit", 4096) is torch.uint8
    assert moment_dtype("8bit", 4095) is torch.float32
