import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.small_configs import GROUPED, LATENT
from rorqual.model import Transformer
from rorqual.precision import recompute as module
from rorqual.precision.convert import convert
from rorqual.precision.recompute import Activations
from rorqual.train import set_seed

CONFIGS = {"latent": replace(LATENT, num_nextn_predict_layers=1), "grouped": GROUPED}


def run(name, how, dtype=torch.float32, precision=None, **options):
    """Loss, gradients, loads and the bytes kept for the backward pass."""
    set_seed(0)
    model = Transformer(CONFIGS[name])
    if precision:
        convert(model, precision)
    model.to(dtype)
    activations = Activations(model, how, **options)
    torch.manual_seed(1)
    tokens, routing = torch.randint(0, 60, (3, 16)), []
    with activations.kept():
        hidden = model(tokens, routing=routing)
        states = [hidden, *model.mtp_hidden_states(hidden, tokens, routing=routing)]
        loss = sum(
            nn.functional.cross_entropy((s @ model.head_weight.T).flatten(0, 1), tokens.flatten()) for s in states
        )
        loss = loss + sum(r.sequence_loss for r in routing)
    assert not activations._outputs
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, [r.load for r in routing]


@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["v3", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_bits(name, how, dtype, precision):
    loss, grads, loads = run(name, "none", dtype, precision)
    loss_, grads_, loads_ = run(name, how, dtype, precision)
    assert torch.equal(loss, loss_)
    assert all(torch.equal(a, b) for a, b in zip(loads, loads_, strict=True))
    for parameter, grad in grads.items():
        assert torch.equal(grad, grads_[parameter]), parameter


def test_offloaded_activations_come_back(monkeypatch):
    """There is no GPU here: every tensor is taken for one of a GPU's, and comes back from its copy."""
    copies = []

    def to_cpu(tensor):
        copies.append(weakref.ref(copy := tensor.clone()))
        return copy

    monkeypatch.setattr(module, "_to_cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False))
    loss, grads, _ = run("latent", "v3", offload=True)
    monkeypatch.undo()
    plain, exact, _ = run("latent", "none")
    torch.testing.assert_close(loss, plain)
    assert len(copies) > 50
    for parameter, grad in exact.items():
        torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=1e-6)


def kept_bytes(how, precision):
    """What a forward pass allocates and does not free, by PyTorch's own record of allocations."""
    set_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 256, "q_lora_rank": 32}
    model = Transformer(replace(LATENT, **sizes))
    if precision:
        convert(model, precision)
    activations = Activations(model, how)
    tokens = torch.randint(0, 60, (4, 32))
    recorded = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with recorded as profile, activations.kept():
        loss = model(tokens).sum()
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_each_way_keeps_less():
    plain, v3, full = (kept_bytes(how, None) for how in ("none", "v3", "full"))
    fp8, fp8_v3 = (kept_bytes(how, "fp8") for how in ("none", "v3"))
    assert full < v3 < plain
    assert fp8 < 0.8 * plain
    assert fp8_v3 < 0.62 * plain
    inputs = 4 * 32 * 128 * 4  # of a layer, FP32
    assert full < 8 * inputs  # three layers, embedding, last norm and what the loss keeps
