"""Deferred weight gradients against those of an ordinary backward pass, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.small_configs import GROUPED, LATENT
from rorqual.kernels import linear
from rorqual.kernels.deferred_gradients import deferrable, deferred_weight_gradients
from rorqual.model import Transformer
from rorqual.precision.convert import convert
from rorqual.precision.recompute import Activations

CONFIGS = {
    "latent": replace(LATENT, num_nextn_predict_layers=1, attention_bias=True),
    "odd experts": replace(LATENT, moe_intermediate_size=15),  # sizes that PyTorch's grouped product does not take
    "grouped": replace(GROUPED, attention_bias=True, mlp_bias=True),
}
AT_ONCE = ("norm", "embed_tokens", "lm_head")


def gradients(config, dtype, precision=None, recompute="none", defer=True):
    """Gradients of two backward passes, and the parameters whose weights were due after the first."""
    torch.manual_seed(0)
    model = Transformer(config)
    if precision:
        convert(model, precision)
    for name, p in model.named_parameters():
        if (not name.endswith("gate.weight") and p.ndim > 1) or name.endswith("bias"):
            p.data = p.data.to(dtype)
    activations, late = Activations(model, recompute), []
    for number in range(2):
        tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(number))
        with deferrable(defer):
            with activations.kept():
                hidden, routing = model(tokens), []
                hidden = sum(model.mtp_hidden_states(hidden, tokens, routing=routing), hidden)
                loss = (hidden @ model.head_weight.T).float().logsumexp(-1).sum()
            if not defer:
                loss.backward()
                continue
            with deferred_weight_gradients() as due:
                loss.backward()
            late = late or [name for name, p in model.named_parameters() if p.grad is None]
            due.run()
            assert not len(due)
    return {name: p.grad for name, p in model.named_parameters()}, late


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "recompute"),
    [
        ("latent", torch.float32, None, "none"),
        ("latent", torch.bfloat16, None, "none"),
        ("latent", torch.bfloat16, "fp8", "none"),
        ("latent", torch.float32, "fp8", "v3"),
        ("latent", torch.float32, None, "v3"),
        ("latent", torch.float32, None, "full"),
        ("odd experts", torch.float32, None, "none"),
        ("odd experts", torch.bfloat16, None, "none"),
        ("grouped", torch.float32, None, "none"),
        ("grouped", torch.bfloat16, "fp8", "full"),
    ],
)
def test_the_bits_are_those_of_an_ordinary_backward_pass(name, dtype, precision, recompute):
    found, late = gradients(CONFIGS[name], dtype, precision, recompute)
    exact, _ = gradients(CONFIGS[name], dtype, precision, recompute, defer=False)
    for parameter, gradient in exact.items():
        assert gradient.any()
        assert torch.equal(found[parameter], gradient), parameter
    # An FP8 linear's bias is added outside of it.
    expected = [n for n in exact if not any(kind in n for kind in AT_ONCE) and not (precision and n.endswith("bias"))]
    assert [n for n in late if not (precision and n.endswith("bias"))] == expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 15])
def test_grouped(outputs, dtype, compiled, monkeypatch):
    """With an expert that has no rows."""
    if not compiled:
        monkeypatch.setattr(linear, "_grouped_usable", lambda x, weight: False)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 24).to(dtype), torch.randn(3, outputs, 24).to(dtype)
    ends, slope = torch.tensor([4, 4, 11], dtype=torch.int32), torch.randn(11, outputs).to(dtype)

    def run(defer):
        own_x, own = x.clone().requires_grad_(), nn.Parameter(weight.clone())
        with deferrable(defer):
            out = linear.grouped_linear(own_x, own, ends)
            if not defer:
                out.backward(slope)
                return own_x.grad, own.grad
            with deferred_weight_gradients() as due:
                out.backward(slope)
        assert own.grad is None
        due.run()
        return own_x.grad, own.grad

    for found, exact in zip(run(True), run(False), strict=True):
        assert torch.equal(found, exact)


def test_frozen_weights_and_weights_that_are_computed():
    """A frozen weight gets no gradient; one that is not a parameter passes it on at once."""
    x, frozen, scale = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 1, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    with deferrable(), deferred_weight_gradients() as due:
        linear.linear(x, frozen, bias).sum().backward()
        linear.linear(x, frozen * scale).sum().backward()
    assert bias.grad is None
    assert torch.equal(scale.grad, torch.full((4, 1), 6.0))
    due.run()
    assert torch.equal(bias.grad, torch.full((4,), 2.0))
    assert frozen.grad is None


def test_ordinary_training_keeps_torchs_own_product():
    x, weight = torch.ones(2, 3), nn.Parameter(torch.ones(4, 3))
    assert "Mm" in type(linear.linear(x, weight).grad_fn).__name__
    with deferrable():
        assert "_Linear" in type(linear.linear(x, weight).grad_fn).__name__
