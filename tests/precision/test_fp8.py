from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.small_configs import GROUPED, LATENT
from rorqual.model import Transformer
from rorqual.precision.convert import KEPT, convert
from rorqual.precision.formats import PRECISIONS
from rorqual.precision.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, FP8UpProjection
from rorqual.train import set_seed


def latent(**changes):
    set_seed(0)
    return Transformer(replace(LATENT, num_nextn_predict_layers=1, **changes))


def loss_of(model):
    torch.manual_seed(1)
    tokens = torch.randint(0, 60, (2, 12))
    hidden = model(tokens)
    states = [hidden, *model.mtp_hidden_states(hidden, tokens)]
    return sum(nn.functional.cross_entropy((s @ model.head_weight.T).flatten(0, 1), tokens.flatten()) for s in states)


def gradients(model):
    loss = loss_of(model)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_all_linears_but_the_head_are_swapped_and_parameters_stay():
    model = latent()
    before = dict(model.named_parameters())
    done = convert(model, "fp8")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, FP8Linear)]
    assert plain == ["lm_head"]
    attention = model.layers[0].self_attn
    assert isinstance(attention.kv_b_proj, FP8UpProjection)
    assert attention.o_proj.formats.cached.name == "E5M6 1×128"
    assert isinstance(model.layers[0].mlp, FP8SwiGLU)
    assert isinstance(model.layers[1].mlp.experts, FP8Experts)
    assert isinstance(model.layers[1].mlp.shared_experts, FP8SwiGLU)
    total = sum(p.numel() for p in model.parameters())
    assert sum(done.swapped.values()) + sum(done.kept.values()) == total
    assert set(done.kept) == {"embedding", "head", "router", "norms"}
    assert set(done.swapped) == {"attention", "feed-forward", "shared experts", "routed experts", "multi-token module"}
    text = "\n".join(done.lines())
    assert all(why in text for why in KEPT.values())
    assert f"{sum(done.swapped.values()) / total:.1%}" in text


@pytest.mark.parametrize("name", PRECISIONS)
def test_gradients_point_where_float32s_do(name):
    """The bound is loose for 4-bit weights, and tight enough to show a transposed or missing product."""
    model = latent(num_experts_per_tok=4, initializer_range=0.1)  # all experts: a choice that flips turns a gradient
    loss, exact = gradients(model)
    convert(model, name)
    rounded_loss, rounded = gradients(model)
    assert rounded_loss != loss
    assert rounded_loss == pytest.approx(loss, rel=0.05 if "fp4" in name else 0.01)
    for parameter, gradient in exact.items():
        cosine = nn.functional.cosine_similarity(gradient.flatten(), rounded[parameter].flatten(), dim=0)
        assert cosine > (0.7 if "fp4" in name else 0.9), parameter


def test_in_eval_mode_the_model_is_the_plain_one():
    model = latent().eval()
    plain = loss_of(model)
    convert(model, "fp8")
    assert torch.equal(loss_of(model), plain)


def test_feed_forwards_with_biases_are_swapped_linear_by_linear():
    set_seed(0)
    model = Transformer(replace(GROUPED, mlp_bias=True, attention_bias=True))
    convert(model, "fp8")
    mlp = model.layers[0].mlp
    assert not isinstance(mlp, FP8SwiGLU)
    assert isinstance(mlp.gate_proj, FP8Linear)
    assert isinstance(mlp.down_proj, FP8Linear)
    loss, rounded = gradients(model)
    model.eval()
    exact_loss, exact = gradients(model)
    assert loss == pytest.approx(exact_loss, rel=0.01)
    for name, gradient in exact.items():
        if gradient.norm() > 1e-5:  # a bias of keys has none: softmax takes it away
            assert nn.functional.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0) > 0.95, name
