"""GPTQ does what the paper's formula says, and less is lost by it than by rounding to nearest."""

import pytest
import torch

from rorqual.precision import gptq as module
from rorqual.precision.gptq import DAMPING, gptq
from rorqual.precision.integer_rounding import dequantized, output_error, per_input, round_nearest


def correlated(rows, K, seed=0):
    """Inputs that share a few directions, some channels larger than others."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=draw) @ torch.randn(6, K, generator=draw)
    return (x + 0.3 * torch.randn(rows, K, generator=draw)) * torch.logspace(-1, 1, K)[
        torch.randperm(K, generator=draw)
    ]


def by_definition(weight, gram, scales, bits):
    """Optimal brain quantisation (paper, eq. 2) of one column after another: at every step the inverse of the damped
    Hessian of the columns that are left, computed anew."""
    zero = 8 if bits == "int4" else 128
    W, H = weight.double().clone(), gram.double()
    H = H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    scale, q = per_input(scales, weight.shape[1]).double(), torch.zeros_like(W)
    left = gram.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(H[left][:, left])
        i = left[0]
        q[:, i] = (W[:, i] / scale[:, i]).round().clamp(-zero, zero - 1)
        error = (W[:, i] - q[:, i] * scale[:, i]) / inverse[0, 0]
        W[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]
    return q + zero


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("block", [128, 7])
def test_it_is_the_papers_formula(bits, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    x = correlated(200, 48)
    weight, gram = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)), x.T @ x
    before = weight.clone()
    q, scales = gptq(weight, gram, bits)
    assert torch.equal(weight, before)
    assert torch.equal(scales, round_nearest(weight, bits)[1])
    expected = by_definition(weight, gram, scales, bits)
    assert (q.double() - expected).abs().max() <= 1
    assert (q.double() == expected).double().mean() > 0.99  # in 32 bits a tie may fall to the other side


@pytest.mark.parametrize(("bits", "most"), [("int4", 0.6), ("int8", 0.6)])
def test_less_is_lost_on_correlated_inputs(bits, most):
    x, other = correlated(1000, 96).split(500)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    losses = [
        output_error(dequantized(q, scales, bits) - weight, other.T @ other)  # on inputs that it has not seen
        for q, scales in (gptq(weight, x.T @ x, bits), round_nearest(weight, bits))
    ]
    assert losses[0] < most * losses[1]


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated(200, 64)
    x[:, ::3] = 0
    weight = torch.randn(8, 64)
    q, scales = gptq(weight, x.T @ x, "int4")
    plain, same = round_nearest(weight, "int4")
    assert torch.equal(scales, same)
    assert torch.equal(q[:, ::3], plain[:, ::3])
    assert torch.equal(gptq(weight, torch.zeros(64, 64), "int4")[0], plain)


def test_the_error_is_that_of_the_outputs():
    x, error = torch.randn(30, 16), torch.randn(5, 16)
    assert output_error(error, x.T @ x) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-4)
    assert output_error(error, None) == pytest.approx(float(error.square().sum()), rel=1e-6)
