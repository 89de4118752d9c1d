"""Costs against the published ones."""

import pytest
import torch

from rorqual.model import ModelConfig, Transformer
from rorqual.plan.cost import (
    active_after_layers,
    active_by_layer,
    flops_per_token,
    mtp_flops_per_token,
    mtp_parameters,
    parameters,
)
from rorqual.plan.known_models import find_model
from rorqual.plan.process_memory import memory
from rorqual.recipe import OptimizerSection

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = MLA | {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
V2 = MLA | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
    "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1536, "first_k_dense_replace": 1,
}  # fmt: skip
V2_LITE = MLA | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "attention_bias": True,
}  # fmt: skip
LLAMA_405B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
}  # fmt: skip
SMALL = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True,
    "mlp_bias": True,
}  # fmt: skip
SMALL_MLA = SMALL | {
    "model_type": "deepseek_v3", "num_key_value_heads": None, "tie_word_embeddings": False, "mlp_bias": False,
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_nextn_predict_layers": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "total", "active"),
    [(V3, 671, 37), (V2, 236, 21), (V2_LITE, 15.7, 2.45), (QWEN_7B, 7.61, 7.07), (LLAMA_405B, 406, 404)],
)
def test_published_parameter_counts(sizes, total, active):
    """Billions; V2-Lite's 2.4 active and Qwen's 7.61 are as published, Qwen's active are its all but the embedding."""
    counted = [n / 1e9 for n in parameters(ModelConfig(**sizes))]
    assert counted == pytest.approx([total, active], abs=0.5 if total > 100 else 0.01)


def test_the_multi_token_module_makes_685():
    """V3's release holds 685 B: the module's own 11.6 B and copies of embedding and head."""
    config = ModelConfig(**V3)
    copies = 2 * config.vocab_size * config.hidden_size
    assert (parameters(config)[0] + mtp_parameters(config) + copies) / 1e9 == pytest.approx(685, abs=0.6)


@pytest.mark.parametrize("sizes", [V3, V2, V2_LITE, QWEN_7B, LLAMA_405B, SMALL, SMALL_MLA])
def test_counts_equal_the_built_network(sizes):
    config = ModelConfig(**sizes)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)[0] + mtp_parameters(config)


@pytest.mark.parametrize(("sizes", "gflop"), [(V3, 250), (V2, 155), (LLAMA_405B, 2448)])
def test_training_flops_of_hw_table_2(sizes, gflop):
    assert flops_per_token(ModelConfig(**sizes), 4096) / 1e9 == pytest.approx(gflop, rel=0.015)


def test_qwens_published_flops_leave_something_out():
    """394 GFLOP are fewer than 6 for each of the 70.2 B weights of its layers (HW table 2); attention is 25 more."""
    config = find_model("qwen2.5-72b")
    layers = parameters(config)[0] - 2 * config.vocab_size * config.hidden_size
    assert 6 * layers > 394e9
    attention = 3 * 4 * 128 * 64 * 2048 * 80
    head = 6 * config.vocab_size * config.hidden_size
    assert flops_per_token(config, 4096) == pytest.approx(6 * layers + attention + head, rel=1e-3)


def test_flops_are_those_torch_counts():
    """torch's own counter, less the half of attention that a causal mask leaves out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(**(SMALL_MLA | {"n_routed_experts": None, "attention_bias": False}))
    model, length = Transformer(config), 16
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens)
        hidden @ model.head_weight.T
    full = 2.0 * 2 * length * length * config.num_attention_heads * (8 + 4 + 6)
    attention = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" in str(k))
    products = counter.get_total_flops() - attention
    norms_and_lookups = 0.05
    ours = length * flops_per_token(config, length, training=False)
    assert ours == pytest.approx(products + full / 2, rel=norms_and_lookups)
    assert flops_per_token(config, length) == 3 * flops_per_token(config, length, training=False)


def test_multi_token_flops_are_a_layer_and_a_head_a_depth():
    one, two = (ModelConfig(**(SMALL_MLA | {"num_nextn_predict_layers": n})) for n in (1, 2))
    assert mtp_flops_per_token(two, 64) == 2 * mtp_flops_per_token(one, 64)
    deeper = ModelConfig(**(SMALL_MLA | {"num_nextn_predict_layers": 0, "num_hidden_layers": 3}))
    layer = flops_per_token(deeper, 64) - flops_per_token(one, 64)
    assert mtp_flops_per_token(one, 64) == pytest.approx(layer + 6 * 32 * (2 * 32 + 100))


@pytest.mark.parametrize("sizes", [SMALL, SMALL_MLA])
def test_memory_of_activations_is_what_autograd_keeps(sizes):
    config = ModelConfig(**(sizes | {"num_nextn_predict_layers": 0, "hidden_size": 128, "vocab_size": 256}))
    model, kept = Transformer(config), {}
    own = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model(torch.zeros(4, 64, dtype=torch.int64))
    assert hidden.requires_grad
    assert memory(config, 256).activations == pytest.approx(sum(kept.values()), rel=0.35)


def test_memory_by_choice():
    config = ModelConfig(**SMALL_MLA)
    count = parameters(config)[0] + mtp_parameters(config)
    plain = memory(config, 64)
    assert (plain.weights, plain.masters, plain.gradients, plain.moments) == (4 * count, 0, 4 * count, 8 * count)
    half = memory(config, 64, dtype="bfloat16", ema=True)
    matrices = half.masters // 4  # norms and router are FP32 in the model, and their own masters
    assert 0.95 * count < matrices < count
    assert (half.weights, half.ema) == (4 * count - 2 * matrices, 4 * count)
    assert memory(config, 64, optimizer=OptimizerSection(name="muon")).moments < plain.moments
    assert memory(config, 64, optimizer=OptimizerSection(moments="bfloat16")).moments == 4 * count
    assert plain.total == sum(vars(plain).values())


@pytest.mark.parametrize("depth", [0, 2])
def test_active_parameters_by_part(depth):
    """All of V3's, and for each multi-token module a layer, a projection, three norms and the head again."""
    config = ModelConfig.from_dict(V3 | {"num_nextn_predict_layers": depth})
    by_layer, D = active_by_layer(config), config.hidden_size
    module = by_layer[-1] + 2 * D * D + 3 * D + config.vocab_size * D
    assert sum(by_layer) + active_after_layers(config) == parameters(config)[1] + depth * module
