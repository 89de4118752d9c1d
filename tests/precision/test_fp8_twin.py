"""The FP8 twin of a model that is trained."""

from dataclasses import replace

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.model import Transformer
from rorqual.precision.fp8_twin import FP8Twin, twin_bytes
from rorqual.train import set_seed

TOKENS = torch.arange(24).view(1, 24)


def model_of(config):
    """Wide enough for more than one block, and of which no size is a multiple of a block's."""
    set_seed(0)
    experts = {"moe_intermediate_size": 200} if config.n_routed_experts else {}
    return Transformer(replace(config, hidden_size=144, intermediate_size=136, **experts))


@pytest.mark.parametrize("config", [GROUPED, LATENT])
def test_twin_is_the_release_in_fp8(config, tmp_path):
    model = model_of(config)
    twin = FP8Twin(model)
    save_model(model, tmp_path / "release", fp8="fp32")
    released = load_model(tmp_path / "release", weights="fp8").eval()
    with torch.no_grad():
        assert torch.equal(twin.model(TOKENS), released(TOKENS))
        assert not torch.equal(twin.model(TOKENS), model.eval()(TOKENS))


def test_bytes_are_those_of_codes_and_scales():
    config = replace(LATENT, num_hidden_layers=1, first_k_dense_replace=1, hidden_size=256, intermediate_size=128)
    attention = (12, 256), (64 - 16, 12), (20, 256), (4 * 18, 16), (256, 40)  # q_a, q_b, kv_a, kv_b, o
    sizes = [*attention, (128, 256), (128, 256), (256, 128)]
    assert twin_bytes(config) == sum(n * k + 4 * -(-n // 128) * -(-k // 128) for n, k in sizes)


def test_refresh_follows_the_weights():
    moe = model_of(LATENT)
    twin = FP8Twin(moe)
    assert twin.model.model.embed_tokens.weight is moe.model.embed_tokens.weight
    assert twin.model.moe_layers()[0].gate.weight is moe.moe_layers()[0].gate.weight
    assert isinstance(twin.model.moe_layers()[0].experts.gate_up_proj, FP8Weight)
    with torch.no_grad():
        before = twin.model(TOKENS)
        for parameter in moe.parameters():
            parameter.mul_(1.5)
        twin.refresh()
        after, fresh = twin.model(TOKENS), FP8Twin(moe).model(TOKENS)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)
