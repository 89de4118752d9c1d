"""An FP8 KV cache: what the engine answers is what a model answers that reads the same rounded values."""

import pytest
import torch

from helpers.small_configs import DEVICES, GROUPED, LATENT, agree
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.paged_kv_cache import PagedKVCache, block_bytes
from rorqual.kernels import cpu, kv_fp8
from rorqual.model import Transformer
from rorqual.model.kv_cache import PrefillView
from rorqual.precision.quantize import convert

FP8 = torch.float8_e4m3fn
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [[(3 * i + j * j) % 59 + 1 for j in range(n)] for i, n in enumerate((1, 15, 16, 17, 40, 70, 5, 33))]
CONFIGS = {
    "latent": LATENT.replace(max_position_embeddings=200, num_nextn_predict_layers=1),
    "wide latent": LATENT.replace(max_position_embeddings=200, num_nextn_predict_layers=1, kv_lora_rank=136),
    "grouped": GROUPED.replace(max_position_embeddings=200),
}


class RoundedValues:
    """A cache of one sequence in which keys, values and latents are rounded to FP8, and rotated keys to BF16."""

    def __init__(self, latent):
        self.latent, self.layers = latent, {}

    def append(self, layer, a, b):
        new = [self.rounded(a), b.bfloat16().to(b.dtype) if self.latent else self.rounded(b)]
        old = self.layers.get(layer)
        self.layers[layer] = new if old is None else [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
        return [PrefillView(slice(0, a.shape[1]), *self.layers[layer])]

    @staticmethod
    def rounded(x):
        """Written without the functions under test."""
        parts = []
        for tile in x.float().split(128, -1):
            scale = tile.abs().amax(-1, keepdim=True) / 448
            parts.append((tile / scale).clamp(-448, 448).to(FP8).float() * scale)
        return torch.cat(parts, -1).to(x.dtype)


@torch.no_grad()
def reference(model, prompt, count):
    """Greedy tokens, and log-probabilities, one token after another."""
    device = model.head_weight.device
    cache, tokens, logprobs = RoundedValues(model.config.is_mla), list(prompt), []
    for i in range(count):
        new = torch.tensor([tokens if i == 0 else tokens[-1:]], device=device)
        positions = torch.arange(len(tokens) - new.shape[1], len(tokens), device=device).unsqueeze(0)
        states = model(new, positions, cache=cache)[0]
        logp = (states[-1] @ model.head_weight.T).float().log_softmax(-1)
        tokens.append(int(logp.argmax()))
        logprobs.append(float(logp.max()))
    return tokens[len(prompt) :], logprobs


@pytest.fixture(scope="module", params=[f"{config} {device}" for config in CONFIGS for device in DEVICES])
def model(request):
    config, _, device = request.param.rpartition(" ")
    torch.manual_seed(3)
    return Transformer(CONFIGS[config]).eval().to(device)


# Of the wide latent's rounding, in tiles of 128, the tests of values tell.
TWO = pytest.mark.parametrize(
    "model",
    [
        pytest.param(f"{config} {device}", marks=pytest.mark.slow if config == "wide latent" else ())
        for config in CONFIGS
        for device in DEVICES
    ],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def expected(model):
    return [reference(model, prompt, 30) for prompt in PROMPTS]


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3, "max_prefill_tokens": 7}], ids=["all", "in pieces"])
def test_answers_are_those_of_a_model_that_reads_the_same_values(model, expected, options):
    found = Engine(model, kv_cache_dtype=FP8, **options).generate(PROMPTS, GREEDY)
    exact = Engine(model).generate(PROMPTS, GREEDY)
    same = [c.tokens == tokens for c, (tokens, _) in zip(found, expected, strict=True)]
    assert sum(same) >= len(PROMPTS) - 1, "where a value lies between two numbers, it may be rounded the other way"
    errors, own = [], []
    for c, (tokens, logprobs), e in zip(found, expected, exact, strict=True):
        if c.tokens == tokens:
            errors += [abs(x - y) for x, y in zip(c.logprobs, logprobs, strict=True)]
        if e.tokens == tokens:
            own += [abs(x - y) for x, y in zip(e.logprobs, logprobs, strict=True)]
    assert torch.tensor(errors).median() < 1e-4
    assert torch.tensor(own).median() > 3e-4, "FP8 shows"


@TWO
def test_prefix_cache(model):
    engine = Engine(model, kv_cache_dtype=FP8, prefix_cache=True)
    first = engine.generate(PROMPTS, GREEDY)
    again = engine.generate(PROMPTS, GREEDY)
    assert agree([c.tokens for c in again], [c.tokens for c in first], model)
    assert sum(c.cached_tokens for c in again) > sum(len(p) // 16 * 16 for p in PROMPTS) // 2


@TWO
def test_copies_of_a_prompts_last_block(model):
    """Samples of one prompt share its blocks, and each continues in a copy of the last."""
    params = SamplingParams(seed=5, n=3, max_tokens=20, ignore_eos=True)
    together = Engine(model, kv_cache_dtype=FP8).generate(PROMPTS, params)
    one_by_one = Engine(model, kv_cache_dtype=FP8, max_num_seqs=1).generate(PROMPTS, params)
    assert agree([c.tokens for c in together], [c.tokens for c in one_by_one], model)


@TWO
def test_preemption(model):
    plain = Engine(model, kv_cache_dtype=FP8).generate(PROMPTS, GREEDY)
    few = 12 * block_bytes(model.config, FP8)
    engine = Engine(model, kv_cache_dtype=FP8, max_num_seqs=8, kv_cache_bytes=few)
    found = engine.generate(PROMPTS, GREEDY)
    assert engine.status().counters.preemptions > 0, "the cache was to be too small"
    assert agree([c.tokens for c in found], [c.tokens for c in plain], model)
    assert engine.status().blocks_used == 0


@TWO
@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_speculative_decoding(model, method):
    if method == "mtp" and not model.config.num_nextn_predict_layers:
        pytest.skip("no multi-token module")
    plain = Engine(model, kv_cache_dtype=FP8).generate(PROMPTS, GREEDY)
    engine = Engine(model, kv_cache_dtype=FP8, speculative=method)
    found = engine.generate(PROMPTS, GREEDY)
    assert engine.status().counters.draft_tokens > 0
    assert agree([c.tokens for c in found], [c.tokens for c in plain], model)


@pytest.mark.skipif(cpu.capability() is None, reason="no compiled functions here")
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_with_drafts(name):
    torch.manual_seed(3)
    model = convert(Transformer(CONFIGS[name]).eval(), "int8")
    plain = Engine(model, kv_cache_dtype=FP8).generate(PROMPTS, GREEDY)
    for method in ("mtp", "ngram") if model.config.num_nextn_predict_layers else ("ngram",):
        engine = Engine(model, kv_cache_dtype=FP8, speculative=method, max_prefill_tokens=512)
        assert [c.tokens for c in engine.generate(PROMPTS, GREEDY)] == [c.tokens for c in plain]
        assert engine.status().counters.draft_tokens > 0


def test_real_bytes_are_counted():
    v3 = LATENT.replace(kv_lora_rank=512, qk_rope_head_dim=64)
    layers = v3.num_hidden_layers
    assert block_bytes(v3, torch.bfloat16) == 16 * layers * 1152
    assert block_bytes(v3, FP8) == 16 * layers * 656
    grouped = GROUPED.replace(head_dim=64)
    assert block_bytes(grouped, FP8) == 16 * grouped.num_hidden_layers * 2 * 2 * (64 + 4)
    for config in (v3, grouped, LATENT):
        cache = PagedKVCache(config, 3, FP8, torch.device("cpu"), 1)
        stored = sum(s.numel() * s.element_size() for layer in cache.layers for s in layer)
        assert stored == 3 * block_bytes(config, FP8, 1)


def test_more_tokens_fit_in_the_same_memory():
    model = Transformer(LATENT.replace(kv_lora_rank=512, qk_rope_head_dim=64)).bfloat16()
    counts = []
    for dtype in (None, FP8):
        engine = Engine(model, kv_cache_dtype=dtype, kv_cache_bytes=1 << 24)
        engine.prepare()
        counts.append(engine.status().blocks)
    assert counts[1] == pytest.approx(counts[0] * 1152 / 656, rel=0.01)


def test_rows_in_the_store_are_those_of_the_kernel(model):
    """Blocks hold what `quantize` gives, at the slots of their tokens."""
    config = model.config
    cache = PagedKVCache(config, 4, FP8, model.head_weight.device)
    width = config.mla.kv_lora_rank if config.is_mla else config.gqa.head_dim
    heads = () if config.is_mla else (config.gqa.num_key_value_heads,)
    a = torch.randn(5, *heads, width, device=model.head_weight.device)
    b = torch.randn(5, config.mla.qk_rope_head_dim, device=a.device) if config.is_mla else a * 2
    slots = torch.tensor([3, 17, 16, 63, 40], device=a.device)
    cache.append(0, slots, a, b)
    assert torch.equal(cache.slots[0][0][slots], kv_fp8.quantize(a))
    assert torch.equal(cache.slots[0][1][slots], b.bfloat16() if config.is_mla else kv_fp8.quantize(b))
    cache.copy([3, 1], [0, 2])
    for store in cache.layers[0]:
        assert torch.equal(store[0], store[3])
        assert torch.equal(store[2], store[1])
