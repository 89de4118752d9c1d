"""The twin of a model that is trained, in 4 or 8 bits."""

import copy
from dataclasses import replace

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.adapters.lora import add_lora, lora_parameters, merge_lora
from rorqual.engine import Engine, SamplingParams
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import Transformer
from rorqual.precision.int_twin import IntTwin
from rorqual.precision.quantize import convert
from rorqual.precision.rollout_twin import twin_bytes
from rorqual.recipe import LoRASection
from rorqual.train import set_seed

TOKENS = torch.arange(24).view(1, 24)


def model_of(config):
    set_seed(0)
    return Transformer(replace(config, hidden_size=64, intermediate_size=96)).eval()


@pytest.mark.parametrize("config", [GROUPED, LATENT])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@torch.no_grad()
def test_twin_is_the_converted_model(config, bits, monkeypatch):
    """But for smoothing, which is for models that are trained no more."""
    model = model_of(config)
    before = model(TOKENS)
    twin = IntTwin(model, bits, torch.float32)
    monkeypatch.setattr("rorqual.precision.quantize.smooth", lambda model: None)
    converted = convert(copy.deepcopy(model), bits)
    assert torch.equal(twin.model(TOKENS), converted(TOKENS))
    assert torch.equal(model(TOKENS), before)  # it shares nothing that is rounded
    assert not twin.model.mtp_modules
    assert isinstance(twin.model.head_weight, QuantizedWeight)
    packed = [v for m in twin.model.modules() for v in vars(m).values() if isinstance(v, QuantizedWeight)]
    sizes = {id(w): w.data.nbytes + (0 if w.channels is None else w.channels.nbytes) for w in packed}
    assert twin_bytes(model.config, bits) == sum(sizes.values())


@pytest.mark.parametrize("config", [GROUPED, LATENT])
@torch.no_grad()
def test_refresh_reaches_an_engine_that_runs(config):
    model = model_of(config)
    twin = IntTwin(model, "int4", torch.float32)
    engine = Engine(twin.model, kv_cache_bytes=1 << 20)
    params = SamplingParams(temperature=0, max_tokens=12)

    def logprobs(engine):
        return engine.generate([[5, 6, 7]], params)[0].logprobs

    first = logprobs(engine)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    assert logprobs(engine) == first
    twin.refresh()
    fresh = Engine(IntTwin(model, "int4", torch.float32).model, kv_cache_bytes=1 << 20)
    assert logprobs(engine) == logprobs(fresh) != first


@pytest.mark.parametrize("config", [GROUPED, LATENT])
@torch.no_grad()
def test_updates_of_lora_are_added_before_rounding(config):
    model = model_of(config)
    add_lora(model, LoRASection(rank=2), 0)
    for parameter in lora_parameters(model).values():
        parameter.normal_(std=0.2)
    twin = IntTwin(model, "int8", torch.float32)
    found = twin.model(TOKENS)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    assert torch.equal(found, IntTwin(merged, "int8", torch.float32).model(TOKENS))


@torch.no_grad()
def test_a_twin_in_bf16_keeps_its_routers_in_fp32():
    model = model_of(LATENT)
    for name, p in model.named_parameters():
        p.data = p.data if p.ndim < 2 or name.endswith("mlp.gate.weight") else p.data.bfloat16()
    twin = IntTwin(model, "int8", torch.bfloat16).model
    dtypes = {name: p.dtype for name, p in twin.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("mlp.gate.weight")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("mlp.gate.weight")} == {torch.bfloat16}
    completion = Engine(twin, kv_cache_bytes=1 << 20).generate([[5, 6, 7]], SamplingParams(max_tokens=4))[0]
    assert len(completion.tokens) == 4
