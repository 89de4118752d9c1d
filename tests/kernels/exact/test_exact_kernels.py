"""Compiled functions give the bits of their references, a row's bits do not depend on what is beside it, and gradients
are those of the ordinary functions."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from rorqual.kernels.dense_attention import attention
from rorqual.kernels.exact import arithmetic, rows
from rorqual.kernels.exact.attention import exact_attention, exact_paged_attention
from rorqual.kernels.exact.linear import (
    exact_grouped_linear,
    exact_head_linear,
    exact_linear,
    grouped_product_reference,
    head_product_reference,
    product,
    product_reference,
)
from rorqual.model.rope import rope_table

SHAPES = [(1, 1, 1), (0, 5, 3), (1, 7, 1), (7, 1, 33), (7, 300, 65), (13, 257, 16), (500, 20, 40)]  # M, K, N


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def reference(monkeypatch):
    """Runs a function without compiled kernels."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr("rorqual.kernels.cpu.capability", lambda: None)
            return function(*arguments)

    return run


def same(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_the_reference_of_a_fused_multiply_add_rounds_once():
    a, b = torch.randn(2, 300) * 2.0 ** torch.randint(-20, 20, (2, 300))
    c = -(a * b) * (1 + torch.randint(-2, 3, (300,)) * 2.0**-23)  # so that most of it cancels
    c[::3] = torch.randn(100)
    found = arithmetic.fma(a, b, c).tolist()
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        r = np.float32(r)
        beside = [np.nextafter(r, np.float32(way)) for way in (-np.inf, np.inf)]
        assert all(abs(exact - Fraction(float(r))) <= abs(exact - Fraction(float(n))) for n in beside)


def test_exp_and_log_are_close_to_the_truth():
    x = torch.linspace(-86, 87, 10001)
    assert (arithmetic.exp(x).double() / x.double().exp() - 1).abs().max() < 3e-7
    assert arithmetic.exp(torch.tensor([-88.0, -torch.inf, torch.nan])).nan_to_num(7).tolist() == [0, 0, 7]
    y = torch.logspace(0, 9, 1001, dtype=torch.float64)
    assert (arithmetic.log(y) - y.log()).abs().max() < 1e-14


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_a_product_is_the_chain_of_its_reference(M, K, N, bias, compiled):
    x, w, b = torch.randn(M, K + 3)[:, :K], torch.randn(N, K), torch.randn(N) if bias else None
    found = product(x, w, b)
    assert same(found, product_reference(x, w, b))
    assert torch.allclose(found, torch.nn.functional.linear(x, w, b), atol=1e-4)


@pytest.mark.parametrize("ends", [[3, 3, 9], [0, 0, 0], [1, 8, 600]])
def test_experts_products_do_not_depend_on_how_many_rows_each_has(ends, compiled):
    x, w = torch.randn(ends[-1], 40), torch.randn(3, 34, 40)
    found = exact_grouped_linear(x, w, torch.tensor(ends, dtype=torch.int32))
    assert same(found, grouped_product_reference(x, w, torch.tensor(ends)))
    assert same(found[-1:], product(x[-1:], w[2]))


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_have_products_of_their_own(transposed, compiled):
    x, w = torch.randn(2, 5, 3, 20), torch.randn(3, 20, 18) if transposed else torch.randn(3, 18, 20)
    w = w.transpose(1, 2) if transposed else w
    found = exact_head_linear(x, w)
    assert same(found, head_product_reference(x, w))
    assert torch.allclose(found, torch.einsum("bthk,hnk->bthn", x, w), atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours_or_on_threads(compiled):
    x, w = torch.randn(1000, 300), torch.randn(130, 300)
    whole = product(x, w)
    torch.set_num_threads(2)
    assert same(product(x, w), whole)
    for start, end in ((0, 1), (3, 10), (481, 1000)):
        assert same(product(x[start:end], w), whole[start:end])


def keys_and_values(S, G, W, R, V, H, T):
    q, k, shared, v = torch.randn(T, H, W + R), torch.randn(S, G, W), torch.randn(S, R), torch.randn(S, G, V)
    return q.unsqueeze(0), k.unsqueeze(0), shared.unsqueeze(0), v.unsqueeze(0)


WIDTHS = [(2, 8, 0, 8, 4), (1, 16, 8, 16, 4), (3, 17, 0, 70, 3), (1, 5, 3, 5, 5)]  # G, W, R, V, H


@pytest.mark.parametrize(("G", "W", "R", "V", "H"), WIDTHS)
def test_attention_is_its_reference_and_the_ordinary_one(G, W, R, V, H, compiled, reference):
    inputs = keys_and_values(21, G, W, R, V, H, 9)
    found = exact_attention(*inputs, None, 0.3)
    assert same(found, reference(exact_attention, *inputs, None, 0.3))
    q, k, shared, v = inputs
    k = torch.cat([k, shared.unsqueeze(2).expand(-1, -1, G, -1)], -1)
    mask = torch.ones(9, 21, dtype=torch.bool).tril(12)[None, None]
    ordinary = attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, False, 0.3)
    assert torch.allclose(found, ordinary.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(("G", "W", "R", "V", "H"), WIDTHS)
def test_packed_chunked_and_paged_attention_are_the_same_bits(G, W, R, V, H, compiled, reference):
    """A prompt of 5 tokens with two branches of 4, against each branch alone, in chunks and from blocks."""
    q, k, shared, v = keys_and_values(16, G, W, R, V, H, 16)
    branch = torch.tensor([0] * 5 + [1] * 4 + [2] * 4 + [-1] * 3)
    seen = (branch[:, None] == branch) | ((branch == 0) & (branch[:, None] != -1))
    mask = (seen.tril()[None, None],)
    packed = exact_attention(q, k, shared, v, mask, 0.3)[0]
    assert same(packed[None], reference(exact_attention, q, k, shared, v, mask, 0.3))
    for b in (1, 2):
        at = ((branch == 0) | (branch == b)).nonzero()[:, 0]
        own = [x[:, at] for x in (q, k, shared, v)]
        assert same(exact_attention(*own, None, 0.3)[0], packed[at])
        chunk = [own[0][:, 6:], *own[1:]]
        assert same(exact_attention(*chunk, None, 0.3)[0], packed[at][6:])
        blocks = [x[0].new_full((4, 16, *x.shape[2:]), torch.nan) for x in own[1:]]
        for store, x in zip(blocks, own[1:], strict=True):
            store[2, : len(at)] = x[0]
        n = len(at)
        tables, lengths = torch.tensor([[2, 1]] * n, dtype=torch.int32), torch.arange(1, n + 1, dtype=torch.int32)
        paged = exact_paged_attention(own[0][0], *blocks, tables, lengths, 0.3)
        assert same(paged, packed[at])
        assert same(reference(exact_paged_attention, own[0][0], *blocks, tables, lengths, 0.3), paged)


def test_several_masks_cover_a_row_in_turn(compiled):
    q, k, shared, v = keys_and_values(20, 2, 8, 0, 8, 4, 20)
    tril = torch.ones(8, 8, dtype=torch.bool).tril()
    masks = (tril.expand(2, 1, 8, 8), tril[None, None, :4, :4])
    found = exact_attention(q, k, shared, v, masks, 1.0)
    for cut in (slice(0, 8), slice(8, 16), slice(16, 20)):
        assert same(found[:, cut], exact_attention(*(x[:, cut] for x in (q, k, shared, v)), None, 1.0))


ROWS = {
    "norm": lambda x: rows.exact_rms_norm(x, torch.linspace(0.5, 2, x.shape[-1]), 1e-5),
    "swiglu": lambda x: rows.exact_swiglu(x, x.flip(0) * 3),
    "joined": lambda x: rows.exact_swiglu_joined(torch.cat([x, -x], -1), torch.linspace(0, 1, len(x))),
    "sigmoid": rows.exact_sigmoid,
    "softmax": rows.exact_softmax,
    "logprobs": lambda x: rows.exact_logprobs(x, torch.arange(len(x)) % x.shape[1], torch.linspace(0, 2, len(x))),
    "rotary": lambda x: rows.exact_rotary(
        x[:, : x.shape[1] // 2 * 2].view(1, len(x), 1, -1), (torch.randn(1, len(x), 1, x.shape[1] // 2),) * 2, True
    ),
}


@pytest.mark.parametrize("width", [2, 7, 64, 601])
@pytest.mark.parametrize("name", ROWS)
def test_functions_of_rows_are_their_references(name, width, compiled, reference):
    x = torch.randn(9, width) * 5
    found, again = [], []
    for use, into in ((lambda f, x: f(x), found), (lambda f, x: reference(f, x), again)):
        torch.manual_seed(1)
        into.append(use(ROWS[name], x))
    assert same(found[0], again[0])


def test_functions_of_rows_are_right():
    x = torch.randn(9, 65) * 5
    weight = torch.linspace(0.5, 2, 65)
    expected = {
        "norm": torch.nn.functional.rms_norm(x, (65,), weight, 1e-5),
        "swiglu": torch.nn.functional.silu(x) * x.flip(0) * 3,
        "sigmoid": x.sigmoid(),
        "softmax": x.softmax(-1),
    }
    for name, wanted in expected.items():
        assert torch.allclose(ROWS[name](x), wanted, rtol=2e-6, atol=1e-6)
    temperatures = torch.tensor([1.0, 0.5, 2.0] * 3)
    found = rows.exact_logprobs(x, torch.arange(9), temperatures)
    wanted = (x.double() / temperatures[:, None]).log_softmax(-1)[torch.arange(9), torch.arange(9)]
    assert torch.allclose(found.double(), wanted, rtol=1e-6)
    with pytest.raises(IndexError, match="vocabulary of 65 tokens"):
        rows.exact_logprobs(x, torch.full((9,), 65), temperatures)


def test_the_rotary_table_is_right_and_independent_of_its_shape():
    positions, frequencies = torch.arange(70_000).unsqueeze(0), 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    angles = (positions[..., None].float() * frequencies).unsqueeze(2)
    cos, sin = rows.exact_rotary_table(angles, 1.0)
    assert (cos.double() - angles.double().cos()).abs().max() < 3.1e-8  # half a float's spacing below 1
    assert (sin.double() - angles.double().sin()).abs().max() < 3.1e-8
    for start in (0, 7, 69_999):
        assert same(rows.exact_rotary_table(angles[:, start : start + 3], 1.0)[0], cos[:, start : start + 3])
    ordinary = rope_table(positions, frequencies, 2.0, torch.float32)
    assert torch.allclose(rows.exact_rotary_table(angles, 2.0)[0], ordinary[0], atol=1e-6)


def test_gradients_are_those_of_the_ordinary_functions():
    def gradients(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        torch.manual_seed(5)
        return torch.autograd.grad(out, inputs, torch.randn(out.shape))

    x, w, b = torch.randn(2, 6, 20), torch.randn(9, 20), torch.randn(9)
    q, k, shared, v = keys_and_values(6, 1, 16, 8, 16, 4, 6)
    ends, experts = torch.tensor([4, 4, 12], dtype=torch.int32), torch.randn(3, 8, 20)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()

    def plain_attention(q, k, shared, v):
        q, k, v = (x.transpose(1, 2) for x in (q, torch.cat([k, shared.unsqueeze(2)], -1), v))
        weights = (q @ k.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    def plain_experts(x, w):
        return torch.cat([part @ own.T for part, own in zip(x.tensor_split(ends[:-1].long()), w, strict=True)])

    for exact, plain, inputs in (
        (exact_linear, torch.nn.functional.linear, (x, w, b)),
        (lambda x, w: exact_grouped_linear(x, w, ends), plain_experts, (x.view(12, 20), experts)),
        (exact_head_linear, lambda x, w: torch.einsum("bthk,hnk->bthn", x, w), (q, torch.randn(4, 5, 24))),
        (lambda *t: exact_attention(*t, mask, 0.3), plain_attention, (q, k, shared, v)),
        (lambda x, w: rows.exact_rms_norm(x, w, 1e-5), lambda x, w: torch.rms_norm(x, (20,), w, 1e-5), (x, w[0])),
        (rows.exact_swiglu, lambda a, b: torch.nn.functional.silu(a) * b, (x, x.flip(0))),
        (rows.exact_sigmoid, torch.sigmoid, (x,)),
        (rows.exact_softmax, lambda x: x.softmax(-1), (x,)),
    ):
        for found, wanted in zip(gradients(exact, *inputs), gradients(plain, *inputs), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
