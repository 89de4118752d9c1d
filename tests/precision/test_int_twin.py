"""The twin of a model that is trained, in 4 or 8 bits."""

import copy
from dataclasses import replace

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.adapters.lora import add_lora, lora_parameters, merge_lora
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import Transformer
from rorqual.model.parameter_kinds import is_converted
from rorqual.precision.int_twin import IntTwin
from rorqual.precision.quantize import convert
from rorqual.precision.rollout_twin import check_device, twin_bytes
from rorqual.recipe import LoRASection
from rorqual.rl.weight_push import sampling_tensors
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


def in_bf16(model):
    """As the optimizer keeps it."""
    for name, p in model.named_parameters():
        p.data = p.data.bfloat16() if is_converted(name, p) else p.data
    return model


@pytest.mark.parametrize("config", [GROUPED, LATENT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_refresh_reaches_an_engine_that_runs(config, dtype):
    model = model_of(config) if dtype is torch.float32 else in_bf16(model_of(config))
    twin = IntTwin(model, "int4", dtype)
    engine = Engine(twin.model, kv_cache_bytes=1 << 20)
    params = SamplingParams(temperature=0, max_tokens=12)

    def logprobs(engine):
        return engine.generate([[5, 6, 7]], params)[0].logprobs

    first = logprobs(engine)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.uniform_(-0.5, 0.5)
    assert logprobs(engine) == first
    twin.refresh()
    fresh = Engine(IntTwin(model, "int4", dtype).model, kv_cache_bytes=1 << 20)
    assert logprobs(engine) == logprobs(fresh) != first
    assert twin_bytes(model.config, "int4", dtype) == sum(t.nbytes for t in sampling_tensors(twin.model).values())


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
def test_what_is_frozen_is_not_packed_again():
    model = model_of(LATENT)
    add_lora(model, LoRASection(rank=2, targets=["o_proj"]), 0)
    twin = IntTwin(model, "int8", torch.float32)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in twin._packed} == {"o_proj"}


@torch.no_grad()
def test_routers_and_their_bias_stay_in_fp32():
    twin = IntTwin(in_bf16(model_of(LATENT)), "int8", torch.bfloat16).model
    dtypes = {name: t.dtype for name, t in (*twin.named_parameters(), *twin.named_buffers())}
    kept = {name for name, dtype in dtypes.items() if dtype is torch.float32}
    assert kept == {name for name in dtypes if ".mlp.gate." in name}


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match=r'grpo.rollout_weights = "int4": packed weights are for a CPU; set device'):
        check_device("int4", torch.device("cuda"))
    check_device("fp8", torch.device("cuda"))
    check_device("int4", torch.device("cpu"))
