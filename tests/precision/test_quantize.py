"""Networks with packed weights say nearly what they said before."""

import pytest
import torch

from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import QuantizedWeight, dequantize
from rorqual.model import ModelConfig, Transformer
from rorqual.precision.quantize import best_scale_reference, convert, round_int4, round_int8

LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    initializer_range=0.1, max_position_embeddings=64,
)  # fmt: skip
GROUPED = ModelConfig(
    model_type="qwen2", vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=64,
    rope_interleave=False, tie_word_embeddings=True, attention_bias=True,
)  # fmt: skip


def error(rounding, weight):
    return float(((dequantize(rounding(weight)) - weight[0]).square().mean() / weight.square().mean()).sqrt())


def test_rounding_errs_as_little_as_it_must():
    weight = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    assert error(round_int8, weight) < 0.01
    assert 0.05 < error(round_int4, weight) < 0.085
    # Better than taking each group's largest weight for the scale, which is what Q4_0 does.
    groups = weight.view(1, 64, -1, 32)
    most = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    plain = ((groups / (most / -8)).round().clamp(-8, 7) * (most / -8)).view_as(weight)
    assert error(round_int4, weight) < float(((plain - weight).square().mean() / weight.square().mean()).sqrt())


def test_zeros_stay_zeros():
    for rounding in (round_int4, round_int8):
        assert dequantize(rounding(torch.zeros(1, 20, 40))).eq(0).all()


@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.05), ("int4", 0.35)])
@torch.no_grad()
def test_a_packed_network_says_nearly_the_same(config, bits, most):
    torch.manual_seed(0)
    model = Transformer(config)
    tokens = torch.randint(0, 90, (2, 20))
    before = model.logits(tokens)
    size = sum(p.nbytes for p in model.parameters())
    convert(model, bits)
    after = model.logits(tokens)
    assert float((after - before).square().mean().sqrt() / before.square().mean().sqrt()) < most
    left = sum(p.nbytes for p in model.parameters())
    assert left < size / 4
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.ndim > 1}
    assert kept <= {"kv_b_proj", "gate"}
    assert isinstance(model.head_weight, QuantizedWeight)
    with pytest.raises(UserError, match="already"):
        convert(model, bits)


def test_the_compiled_choice_of_a_scale_errs_as_little_as_the_reference():
    torch.manual_seed(0)
    groups = torch.randn(3, 50, 32) * torch.rand(3, 50, 1).exp()
    groups[0, 0] = 0.0
    groups[0, 1] *= 1e-6  # scales that FP16 holds as few bits, or as 0
    groups[0, 2] *= 1e-9
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (extreme / -torch.linspace(7.0, 9.5, 16)).half().float()
    expected, best = best_scale_reference(groups, scales), torch.full_like(extreme, -1.0)
    if not cpu.usable(groups):
        pytest.skip("no compiled kernels")
    cpu.call("best_scale", torch.float32, groups, scales, best.numel(), 16, best)

    def errors(scale):
        q = torch.where(scale != 0, groups / scale, 0.0).round().clamp(-8, 7)
        return (q * scale - groups).square().sum(-1)

    torch.testing.assert_close(errors(best), errors(expected), rtol=1e-5, atol=0)
    assert (best == expected).float().mean() > 0.98  # sums in another order can choose another of two equal ones
    assert best[0, 0] == best[0, 2] == 0
