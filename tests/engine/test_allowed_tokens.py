import dataclasses

import pytest
import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.model import ModelConfig, Transformer

V = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama", vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=True, eos_token_id=5,
    )  # fmt: skip
    return Transformer(config).eval()


PROMPTS = [[1, 2, 3], [4, 6]]
PARAMS = SamplingParams(temperature=0.8, top_p=0.7, top_k=60, min_p=0.01, max_tokens=12, n=3, seed=4)


def recorded(model, params=PARAMS, **options):
    return Engine(model, **options).generate(PROMPTS, dataclasses.replace(params, record_allowed=True))


def test_nothing_is_recorded_unless_asked_for(model):
    assert all(c.allowed is None for c in Engine(model).generate(PROMPTS, PARAMS))


@torch.no_grad()
def test_log_probabilities_are_among_the_allowed_tokens(model):
    for i, completion in enumerate(recorded(model)):
        prompt, tokens = PROMPTS[i // 3], completion.tokens
        logits = model.logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].float() / 0.8
        allowed = completion.allowed.mask(torch.arange(len(tokens)))
        assert allowed.sum(1).max() <= 60
        assert 1 < allowed.float().sum(1).mean() < 60
        logp = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1)
        assert completion.logprobs == pytest.approx(
            logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-4
        )
        # Each set is that of the whole filter: no token that is dropped is more probable than one that is kept, and one
        # more token would break top_p, top_k or min_p.
        p = logits.softmax(-1)
        least, following = p.masked_fill(~allowed, 2.0).amin(1), (p * ~allowed).amax(1)
        best, mass = p.amax(1), (p * allowed).sum(1)
        assert (least >= following).all()
        assert (least >= 0.01 * best * 0.999).all()
        assert (mass - least < 0.701).all()
        assert ((mass > 0.699) | (allowed.sum(1) == 60) | (following < 0.01 * best * 1.001)).all()


@pytest.mark.parametrize(
    "options", [{"max_num_seqs": 2}, {"kv_cache_bytes": 1 << 18, "max_num_seqs": 3}, {"speculative": "ngram"}]
)
def test_the_record_does_not_depend_on_the_company(model, options):
    for a, b in zip(recorded(model), recorded(model, **options), strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.allowed.words, b.allowed.words)
        assert len(b.allowed.lengths) == len(b.tokens)


def test_one_token_is_certain(model):
    for completion in recorded(model, SamplingParams(top_k=1, max_tokens=5)):
        assert completion.logprobs == pytest.approx([0.0] * len(completion.tokens), abs=1e-6)
        assert completion.allowed.words.tolist() == completion.tokens
