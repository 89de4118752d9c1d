"""Against an independent computation in float64 that rounds with torch's own casts, tile by tile."""

import pytest
import torch

from rorqual.kernels.number_formats import E5M6_TILE, FP8_BLOCK, FP8_TENSOR, FP8_TILE, MXFP8, with_powers_of_two
from rorqual.kernels.scaled_linear import LinearFormats, scaled_feed_forward, scaled_linear
from rorqual.kernels.swiglu import swiglu_joined_gradient, swiglu_reference

V3 = LinearFormats(FP8_TILE, FP8_BLOCK, FP8_BLOCK, FP8_TILE, FP8_TILE)
MX = LinearFormats(MXFP8, MXFP8, MXFP8.transposed, MXFP8, MXFP8)
TENSOR = LinearFormats(FP8_TENSOR, FP8_TENSOR, FP8_TENSOR, FP8_TENSOR, FP8_TENSOR)
AFTER_ATTENTION = LinearFormats(with_powers_of_two(FP8_TILE), FP8_BLOCK, FP8_BLOCK, FP8_TILE, E5M6_TILE)


def cast(x, height, width, power_of_two=False):
    """Tiles rounded by torch's casts, in float64."""
    out = torch.empty(x.shape, dtype=torch.double)
    height, width = height or len(x), width or x.shape[1]
    for i in range(0, len(x), height):
        for j in range(0, x.shape[1], width):
            tile = x[i : i + height, j : j + width].float()
            scale = tile.abs().max() / 448
            if power_of_two:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            out[i : i + height, j : j + width] = (tile / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return out


def linear_in_float64(x, w, grad, tile, block, mx=False, cached=None):
    """Output, input gradient and weight gradient."""
    column, row = (1, tile), (tile, 1) if tile else (0, 1)
    if not tile:
        column = row = (0, 0)
    turned = block[::-1]
    xr = cast(x, *column, mx)
    y = xr @ cast(w, *block, mx).T
    dx = cast(grad, *column, mx) @ cast(w, *turned, mx)
    kept = (xr if cached is None else cached).float()
    return y, dx, cast(grad, *row, mx).T @ cast(kept, *row, mx)


def numbers(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.exp2(torch.randint(-6, 6, shape).float())


def close(found, exact, dtype=torch.float32):
    """Within the rounding of an FP32 sum, or of the dtype's result."""
    bound = 2e-6 if dtype == torch.float32 else 8e-3
    return (found.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 130, 7), (150, 300, 129), (128, 256, 128)])
@pytest.mark.parametrize(
    ("formats", "tile", "block", "mx"),
    [(V3, 128, (128, 128), False), (MX, 32, (1, 32), True), (TENSOR, 0, (0, 0), False)],
    ids=["fp8", "mxfp8", "tensor"],
)
def test_the_three_products(formats, tile, block, mx, m, k, n, dtype):
    x, w, grad = numbers(m, k).to(dtype), numbers(n, k, seed=1).to(dtype), numbers(m, n, seed=2).to(dtype)
    x.requires_grad_()
    w.requires_grad_()
    y = scaled_linear(x, w, None, formats)
    y.backward(grad)
    exact = linear_in_float64(x.detach(), w.detach(), grad, tile, block, mx)
    for found, right in zip((y, x.grad, w.grad), exact, strict=True):
        assert found.dtype == dtype
        assert close(found, right, dtype)


def test_after_attention_the_input_is_kept_in_e5m6():
    x, w, grad = numbers(6, 256).requires_grad_(), numbers(8, 256, seed=1).requires_grad_(), numbers(6, 8, seed=2)
    scaled_linear(x, w, None, AFTER_ATTENTION).backward(grad)
    kept = torch.empty(6, 256)
    for j in (0, 128):  # E5M6 as a float with six bits of mantissa, in a tile whose scale is a power of two
        tile = x.detach()[:, j : j + 128]
        scale = torch.exp2(torch.ceil(torch.log2(tile.abs().amax(1, keepdim=True) / 65024)))
        mantissa, exponent = torch.frexp(tile / scale)
        kept[:, j : j + 128] = torch.ldexp((mantissa * 128).round() / 128, exponent) * scale
    right = cast(grad, 128, 1).T @ cast(kept, 128, 1, power_of_two=True)
    assert close(w.grad, right)


def test_bias_and_leading_dimensions():
    x, w, b = numbers(2, 3, 64), numbers(5, 64, seed=1), torch.randn(5, requires_grad=True)
    y = scaled_linear(x, w, b, V3)
    flat = scaled_linear(x.view(6, 64), w, None, V3)
    assert torch.equal(y, (flat + b).view(2, 3, 5))
    y.sum().backward()
    assert torch.equal(b.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("ends", [[40], [0, 17, 17, 40, 300], [128, 256, 300]])
@pytest.mark.parametrize("width", [36, 34, 33])
def test_feed_forward_of_experts(ends, width):
    """Each expert is a network of its own: no tile crosses from one's rows, or weights, to another's."""
    E, D = len(ends), 64
    x = numbers(ends[-1], D)
    gate_up, down = numbers(E, 2 * width, D, seed=1) / 50, numbers(E, D, width, seed=2)
    grad = numbers(ends[-1], D, seed=3)
    by_row = torch.exp2(torch.randint(-3, 2, (ends[-1],)).float())  # exact, so that it makes no ties
    x, gate_up, down, by_row = (t.requires_grad_() for t in (x, gate_up, down, by_row))
    y = scaled_feed_forward(x, gate_up, None, down, torch.tensor(ends, dtype=torch.int32), V3, by_row)
    y.backward(grad)
    for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = slice(first, last)
        if first == last:
            assert not gate_up.grad[e].any()
            assert not down.grad[e].any()
            continue
        (gate, up), own = gate_up.detach()[e].chunk(2), down.detach()[e]
        xr = cast(x.detach()[rows], 1, 128)
        h = [(xr @ cast(w, 128, 128).T).float() for w in (gate, up)]
        factor = by_row.detach()[rows, None]
        right = cast(swiglu_reference(*h) * factor, 1, 128) @ cast(own, 128, 128).T
        tied = [not close(*pair) for pair in zip(y[rows], right, strict=True)]
        assert sum(tied) <= 1  # where the last bit of h, which a processor's order of sums decides, moves a number
        assert close(y[rows], right, torch.bfloat16)
        kept = [cast(half, 1, 128).float().requires_grad_() for half in h]
        s = swiglu_reference(*kept)
        g = grad[rows]
        assert close(down.grad[e], cast(g, 128, 1).T @ cast(s.detach() * factor, 128, 1))
        grad_s = (cast(g, 1, 128) @ cast(own, 128, 128)).float()
        assert close(by_row.grad[rows], (grad_s * s.detach()).sum(1))
        s.backward(grad_s * factor)
        grads = [half.grad for half in kept]
        joined = torch.cat(grads, 1)
        wide = cast(joined, 1, 128)
        assert close(x.grad[rows], wide @ torch.cat([cast(w, 128, 128) for w in (gate, up)]), torch.bfloat16)
        weights = cast(joined, 128, 1).T @ cast(xr.float(), 128, 1)
        assert close(gate_up.grad[e], weights, torch.bfloat16)


def test_feed_forward_of_one_network_is_that_of_one_expert():
    x, gate_up, down = numbers(20, 64), numbers(1, 72, 64, seed=1) / 50, numbers(1, 64, 36, seed=2)
    results = []
    for apart in (False, True):
        leaves = [x, *gate_up[0].chunk(2), down[0]] if apart else [x, gate_up, down]
        leaves = [t.clone().requires_grad_() for t in leaves]
        whole = (leaves[0], leaves[1], None, leaves[2], torch.tensor([20], dtype=torch.int32), V3)
        y = scaled_feed_forward(*leaves, None, V3) if apart else scaled_feed_forward(*whole)
        y.sum().backward()
        grads = [t.grad for t in leaves]
        results.append([y, grads[0], torch.cat(grads[1:3]) if apart else grads[1][0], grads[-1].view(64, 36)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_nothing_is_kept():
    x, w = numbers(4, 64), numbers(5, 64, seed=1).requires_grad_()
    with torch.no_grad():
        y = scaled_linear(x, w, None, V3)
    assert y.grad_fn is None
    assert torch.equal(y, scaled_linear(x, w, None, V3))


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, w = numbers(4, 64), numbers(5, 64, seed=1)
    scaled_linear(x.requires_grad_(), w, None, V3).sum().backward()
    assert x.grad is not None
    assert w.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x, w = numbers(4, 64), numbers(5, 64, seed=1)
    x[2, 3] = bad
    y = scaled_linear(x, w, None, V3)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


def test_the_gradient_of_swiglu_in_torch_and_compiled():
    x = torch.randn(5, 12, dtype=torch.double, requires_grad=True)
    grad = torch.randn(5, 6, dtype=torch.double)
    swiglu_reference(*x.chunk(2, -1)).backward(grad)
    for dtype in (torch.double, torch.float):
        found, of_weights = swiglu_joined_gradient(grad.to(dtype), x.detach().to(dtype))
        assert of_weights is None
        torch.testing.assert_close(found.double(), x.grad, rtol=1e-5, atol=1e-6)
