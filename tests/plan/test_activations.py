import gc
import itertools

import pytest
import torch

from rorqual.model import ModelConfig, Transformer
from rorqual.plan.activations import Kept, layer_bytes
from rorqual.precision.convert import convert
from rorqual.precision.recompute import Activations

COMMON = {"vocab_size": 64, "hidden_size": 256, "num_attention_heads": 4}
LATENT = COMMON | {
    "model_type": "deepseek_v3", "intermediate_size": 704, "q_lora_rank": 96, "kv_lora_rank": 64,
    "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "n_routed_experts": 28, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "moe_intermediate_size": 128,
}  # fmt: skip
CONFIGS = {
    "experts": LATENT | {"first_k_dense_replace": 0},
    "dense": LATENT | {"first_k_dense_replace": 9, "q_lora_rank": None},
    "narrow values": LATENT | {"first_k_dense_replace": 9, "v_head_dim": 32},
    "grouped": COMMON | {"model_type": "llama", "intermediate_size": 512, "num_key_value_heads": 2},
}


def allocated(fields, layers, tokens, dtype, precision, recompute):
    """What a forward pass allocates and does not free, by PyTorch's own record."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(num_hidden_layers=layers, **fields)).to(dtype)
    if precision:
        convert(model, precision)
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith("gate.weight"):
            p.data = p.data.float()
    activations = Activations(model, recompute)
    ids = torch.randint(0, 64, (tokens // 32, 32))
    gc.collect()  # what earlier tests left would count as freed
    recorded = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with recorded as profile, activations.kept():
        out = model(ids).sum()
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


# Every value of each.
QUICK = {
    *((name, None, torch.float32, "none") for name in CONFIGS), ("experts", "fp8", torch.bfloat16, "v3"),
    ("experts", "fp8", torch.bfloat16, "full"), ("dense", "fp8", torch.bfloat16, "none"),
}  # fmt: skip


@pytest.mark.usefixtures("compiled_functions")
@pytest.mark.parametrize(
    ("name", "precision", "dtype", "recompute"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CONFIGS, (None, "fp8"), (torch.float32, torch.bfloat16), ("none", "v3", "full"))
    ],
)
def test_a_layer_keeps_what_is_computed(name, dtype, precision, recompute):
    if recompute == "full" and (name, precision) != ("experts", "fp8"):
        pytest.skip("only a layer's input, whatever the layer")
    fields = CONFIGS[name]
    one, two = (allocated(fields, layers, 64, dtype, precision, recompute) for layers in (1, 2))
    config = ModelConfig(num_hidden_layers=2, **fields)
    computed = layer_bytes(config, config.is_moe_layer(1), Kept(dtype.itemsize, precision is not None, recompute))
    assert computed == pytest.approx((two - one) / 64, rel=0.01)


@pytest.fixture
def compiled_functions():
    """The references keep more than the compiled functions."""
    from rorqual.kernels import cpu

    if cpu.capability() is None:
        pytest.skip("no compiled functions")
