"""AWQ's scales change nothing until numbers are rounded, and then less is lost."""

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.model import Transformer
from rorqual.precision.awq import fold, search
from rorqual.precision.calibrate import HiddenStates, recording
from rorqual.precision.integer_rounding import dequantized, output_error, round_nearest


def collected(model, tokens):
    """Inputs of every block's linears, and the blocks with their scales folded."""
    states = HiddenStates(model, tokens)
    for index, block in enumerate(model.model.layers):
        with recording(block) as inputs:
            out = list(states.through(block, index))
        yield index, block, inputs
        states.states = out


@pytest.mark.parametrize(
    "config",
    [
        LATENT.replace(hidden_size=64, num_nextn_predict_layers=1),
        GROUPED.replace(hidden_size=64),
        GROUPED.replace(hidden_size=64, model_type="qwen2", attention_bias=True),
        GROUPED.replace(hidden_size=64, attention_bias=True, mlp_bias=True),
    ],
    ids=["latent", "grouped", "qwen2", "biases"],
)
@torch.no_grad()
def test_a_network_says_the_same_to_the_last_bit(config):
    torch.manual_seed(1)
    model = Transformer(config)
    for name, p in model.named_parameters():  # channels of uneven size, so that there is something to scale
        if name.endswith(("norm.weight", "bias")):
            p.copy_(torch.randn_like(p).exp())
        elif name.endswith(("v_proj.weight", "up_proj.weight", "kv_b_proj.weight")):
            p.mul_(torch.randn(len(p), 1).exp())
    tokens = torch.randint(60, (4, 20))
    before, hidden = model.logits(tokens), model(tokens)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for _, block, inputs in collected(model, tokens):
        fold(block, inputs, "int4", 1)
    changed = {name.split(".", 3)[-1] for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"}
    expected |= (
        {"self_attn.kv_b_proj.weight", "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        if config.is_mla
        else {"self_attn.v_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    )
    assert expected <= changed
    assert torch.equal(model.logits(tokens), before)
    for after, exact in zip(
        model.mtp_hidden_states(hidden, tokens), Transformer.mtp_hidden_states(model, hidden, tokens), strict=True
    ):
        assert torch.equal(after, exact)


@torch.no_grad()
def test_inputs_are_scaled_with_the_weights():
    """What is collected before is, after the folding, what the linears receive."""
    torch.manual_seed(1)
    model = Transformer(LATENT)
    tokens = torch.randint(60, (8, 20))
    for index, block, inputs in collected(model, tokens):
        states = HiddenStates(model, tokens)
        for before in range(index):
            states.advance(model.model.layers[before], before)
        fold(block, inputs, "int4", 1)
        with recording(block) as now:
            list(states.through(block, index))
        for name in now.same_as:
            torch.testing.assert_close(inputs.gram(name), now.gram(name), rtol=1e-4, atol=1e-3)
            assert inputs.count(name) == now.count(name) == 160
        for name, rows in now.routed.items():
            torch.testing.assert_close(inputs.routed[name], rows)


def test_large_channels_lose_less():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=draw), torch.randn(16, 64, generator=draw)
    x[:, ::16] *= 30
    gram = x.T @ x
    s = search([weight], gram, "int4")
    assert torch.equal(s.log2().round().exp2(), s)
    assert s[::16].min() > s[1::16].max()
    losses = [
        output_error(dequantized(*round_nearest(weight * by, "int4"), "int4") / by - weight, gram)
        for by in (s, torch.ones(64))
    ]
    assert losses[0] < 0.5 * losses[1]


def test_channels_that_share_a_source_share_a_scale():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=draw), torch.randn(16, 64, generator=draw)
    x[:, 3] *= 30
    source = torch.arange(32).repeat(2)
    s = search([weight], x.T @ x, "int4", source)
    assert s.shape == (32,)
    assert s.argmax() == 3
