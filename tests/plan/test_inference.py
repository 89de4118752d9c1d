"""Decoding and prefill against published rates, and by hand."""

from dataclasses import replace

import pytest

from rorqual.plan.chips import find_chip
from rorqual.plan.cost import cache_bytes_per_token, flops_per_token, parameters
from rorqual.plan.inference import BANDWIDTH_SHARE, LAYER_SECONDS, Instance
from rorqual.plan.known_models import find_model

V3, H100, H800 = find_model("deepseek-v3"), find_chip("h100"), find_chip("h800")


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("deepseek-v3", 70272), ("qwen2.5-72b", 327680), ("llama-3.1-405b", 516096)]
)
def test_cache_bytes_of_hw_table_1(name, gigabytes):
    assert cache_bytes_per_token(find_model(name)) == gigabytes


@pytest.mark.parametrize(
    ("model", "chips", "prompt", "answer", "published"),
    [
        ("llama-3.1-8b", 1, 128, 2048, 22714), ("llama-3.1-8b", 1, 500, 2000, 17660),
        ("llama-3.1-8b", 1, 1000, 1000, 15220), ("llama-3.1-8b", 1, 2048, 2048, 9305),
        ("llama-3.1-8b", 1, 5000, 500, 3459), ("llama-3.1-8b", 1, 20000, 2000, 1351),
        ("llama-3.1-70b", 2, 1000, 1000, 4205), ("llama-3.1-70b", 2, 2048, 128, 762),
        ("llama-3.1-70b", 2, 20000, 2000, 437), ("llama-3.1-405b", 8, 1000, 1000, 2919),
        ("llama-3.1-405b", 8, 2048, 128, 453), ("llama-3.1-405b", 8, 20000, 2000, 345),
    ],
)  # fmt: skip
def test_dense_models_by_tensorrt_llm(model, chips, prompt, answer, published):
    """Output tokens/s of H100s, weights and cache in FP8, as many sequences as fit (TensorRT-LLM 1.0, performance
    overview). Nothing is fitted to them."""
    engine = Instance(find_model(model), H100, chips, "fp8", "fp8")
    batch = min(2048.0, engine.cache_tokens() / (prompt + answer / 2))
    seconds = answer * engine.decode_seconds(batch, prompt + answer / 2) / batch + engine.prefill_seconds(prompt)
    assert answer / seconds == pytest.approx(published, rel=0.15)


def test_v3s_decoding():
    """DeepSeek's profile: 18 598 tokens/s of a node, EP128, 128 sequences of 4096 tokens a chip. SGLang: 22 282 with
    EP72, 256 of 2000 to 2100, which the share for mixtures is fitted to."""
    profile = Instance(V3, H800, 128, "fp8")
    assert 8 * 128 / profile.decode_seconds(128 * 128, 4096) == pytest.approx(18598, rel=0.05)
    sglang = Instance(V3, H100, 72, "fp8")
    assert 8 * 256 / sglang.decode_seconds(256 * 72, 2050) == pytest.approx(22282, rel=0.05)


@pytest.mark.parametrize(("length", "published"), [(1024, 57674), (2048, 54543), (4096, 50302)])
def test_v3s_prefill_by_sglang(length, published):
    """Tokens/s of a node, EP32 on H100; DeepSeek's own profile is 62 713 at 4096."""
    engine = Instance(V3, H100, 32, "fp8")
    assert 8 * length / engine.prefill_seconds(length) / 32 == pytest.approx(published, rel=0.2)


def test_one_sequence_waits_for_the_weights():
    engine = Instance(find_model("llama-3.1-8b"), H100, 1)
    total = parameters(engine.config)[0] - 128256 * 4096  # the embedding is looked up
    expected = 2 * total / (BANDWIDTH_SHARE * 3.35e12) + 32 * LAYER_SECONDS
    assert engine.decode_seconds(1, 0) == pytest.approx(expected)


def test_prefill_is_flops():
    engine = Instance(find_model("llama-3.1-8b"), H100, 1)
    head = 2 * 128256 * 4096
    flops = 2048 * (flops_per_token(engine.config, 2048, training=False) - head)
    assert engine.prefill_seconds(2048) == pytest.approx(flops / (0.5 * 989.4e12), rel=0.01)
    assert engine.prefill_seconds(2048, cached=1024) > engine.prefill_seconds(1024)
    assert engine.prefill_seconds(2048, cached=1024) < engine.prefill_seconds(2048)


def test_a_large_batch_touches_every_expert():
    engine = Instance(V3, find_chip("gb300"), 4, "fp8")
    times = [engine.decode_seconds(batch, 0) for batch in (1, 8, 64, 512)]
    assert times == sorted(times)
    assert times[2] < 64 * times[0]


def test_weights_and_cache_share_the_memory():
    bf16, fp8 = (Instance(find_model("llama-3.1-8b"), H100, 1, weights) for weights in ("bfloat16", "fp8"))
    assert bf16.weight_bytes() == 2 * fp8.weight_bytes()
    assert fp8.cache_tokens() > bf16.cache_tokens()
    assert replace(fp8, cache="fp8").cache_tokens() == pytest.approx(2 * fp8.cache_tokens())
    assert Instance(V3, H100, 1, "fp8").cache_tokens() == 0
