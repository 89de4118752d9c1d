"""Drafts change how long an answer takes, never the answer."""

from dataclasses import replace

import pytest
import torch

from helpers.small_configs import DEVICES, GROUPED, LATENT, agree
from rorqual.engine import Engine, SamplingParams, speculative
from rorqual.engine.batch import MAX_DRAFTS
from rorqual.engine.model_runner import ModelRunner
from rorqual.engine.paged_kv_cache import block_bytes
from rorqual.engine.speculative import PromptLookupDrafter, min_confidence
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.model import Transformer
from rorqual.precision.quantize import convert

# Compiled products give a row the same result in any company, to the last bit. PyTorch's do not, and rounding
# activations to 8 bits makes much of a last bit.
NOT_EXACT = "without compiled kernels answers from packed weights may depend on how many tokens are computed together"
AHEAD = LATENT.replace(num_nextn_predict_layers=1, max_position_embeddings=200)
PROMPTS = [[(3 * i + j * j) % 59 + 1 for j in range(n)] for i, n in enumerate((1, 15, 16, 17, 40, 70, 5, 33))]
PROMPTS[4] = PROMPTS[4][:10] * 4  # something to look up


@torch.no_grad()
def a_model(config, seed=3, sharper=4.0):
    """A network that says what follows mostly by the newest token, as its multi-token module does: they often agree."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    model.head_weight.mul_(sharper)  # less even distributions
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.mul_(0.3)
    if config.num_nextn_predict_layers:
        width = config.hidden_size
        model.model.layers[-1].eh_proj.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))
    return model


WAYS = [f"{place} {way}" for place in (*DEVICES, "packed") for way in ("mtp", "ngram")]
# The others have every value of each.
LEFT_OUT = {("cpu mtp", 0.0), ("cpu mtp", 0.5), ("cpu ngram", 0.0), ("packed mtp", 0.0), ("packed ngram", 0.5)}


@pytest.fixture(params=WAYS)
def engines(request):
    """Without drafts, and with them."""
    place, way = request.param.split()
    model = a_model(AHEAD if way == "mtp" else GROUPED.replace(max_position_embeddings=200))
    if place == "packed":
        if cpu.capability() is None:
            pytest.skip(NOT_EXACT)
        convert(model, "int8")
    else:
        model.to(place)
    return Engine(model), lambda **options: Engine(model, speculative=way, **options)


@pytest.mark.parametrize(
    ("engines", "temperature"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in LEFT_OUT else ())
        for case in ((way, temperature) for way in WAYS for temperature in (0.0, 0.5))
    ],
    indirect=["engines"],
)
def test_the_same_seed_says_the_same(engines, temperature):
    plain, speculating = engines
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=11, n=2, ignore_eos=True)
    expected = plain.generate(PROMPTS, params)
    for options in ({}, {"max_prefill_tokens": 7, "prefix_cache": True}, {"max_num_seqs": 3}):
        engine = speculating(**options)
        for _ in range(2 if "prefix_cache" in options else 1):
            found = engine.generate(PROMPTS, params)
            assert agree([c.tokens for c in found], [c.tokens for c in expected], engine.model)
            for ours, theirs in zip(found, expected, strict=True):
                if ours.tokens == theirs.tokens:
                    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        counts = engine.status().counters
        assert 0 < counts.accepted_tokens <= counts.draft_tokens
        assert counts.generated_tokens % sum(len(c.tokens) for c in expected) == 0
        assert engine.status().blocks_used == 0


def test_a_cache_too_small_for_all(engines):
    plain, speculating = engines
    config = plain.model.config
    more = int(config.num_nextn_predict_layers > 0)
    engine = speculating(max_num_seqs=8, kv_cache_bytes=12 * block_bytes(config, torch.float32, more))
    params = SamplingParams(seed=2, max_tokens=50, ignore_eos=True)
    found, expected = ([c.tokens for c in e.generate(PROMPTS, params)] for e in (engine, plain))
    assert agree(found, expected, engine.model)
    assert engine.status().counters.preemptions > 0, "the cache was to be too small"
    assert engine.status().blocks_used == 0


def test_wishes_are_granted_all_the_same(engines):
    plain, speculating = engines
    for wish in (
        {"frequency_penalty": 0.4, "temperature": 0.0},
        {"logprobs": 3},
        {"stop_token_ids": (5, 9, 20)},
        {"top_p": 0.6, "temperature": 0.8},
        {"max_tokens": 1},
    ):
        params = replace(SamplingParams(seed=4, max_tokens=40), **wish)
        expected, found = (e.generate(PROMPTS, params) for e in (plain, speculating()))
        found, expected = (
            [(c.tokens, c.finish_reason, len(c.top_logprobs)) for c in all_] for all_ in (found, expected)
        )
        assert agree(found, expected, plain.model)


def test_wishes_of_some_among_others_who_have_none(engines):
    plain, speculating = engines
    base = SamplingParams(temperature=0.3, max_tokens=50, ignore_eos=True)
    wishes = [{}, {"logprobs": 2}, {}, {"presence_penalty": 0.5}]

    def said(engine):
        requests = [
            engine.submit(prompt, replace(base, seed=i, **wishes[i % len(wishes)])) for i, prompt in enumerate(PROMPTS)
        ]
        while not all(request.done for request in requests):
            engine.step()
        return [(r.sequences[0].tokens, len(r.sequences[0].top_logprobs)) for r in requests]

    engine = speculating()
    assert agree(said(engine), said(plain), engine.model)
    assert engine.status().counters.accepted_tokens > 0


def test_the_distribution_is_the_networks():
    """First two tokens of many samples against their probabilities, χ² at the 99.9 % point."""
    model = a_model(AHEAD.replace(vocab_size=6, eos_token_id=None), sharper=1.0)
    prompt, count = [1, 4, 2, 2, 3], 4000
    engine = Engine(model, max_num_seqs=16, speculative="mtp")
    found = engine.generate([prompt], SamplingParams(n=count, max_tokens=3, seed=0))
    assert engine.status().counters.accepted_tokens > 0.2 * count
    with torch.no_grad():
        first = model.logits(torch.tensor([prompt]))[0, -1].softmax(-1)
        rest = model.logits(torch.tensor([[*prompt, t] for t in range(6)]))[:, -1].softmax(-1)
    expected = (first[:, None] * rest).flatten() * count
    seen = torch.bincount(torch.tensor([6 * c.tokens[0] + c.tokens[1] for c in found]), minlength=36)
    likely = expected >= 5
    chi2 = float(((seen - expected)[likely] ** 2 / expected[likely]).sum())
    assert likely.sum() >= 15
    assert chi2 < 66.6, "χ² of 35 degrees of freedom is above this once in a thousand"


def test_a_module_that_is_not_there():
    with pytest.raises(UserError, match="multi-token module"):
        Engine(a_model(GROUPED), speculative="mtp")


def test_look_up():
    lookup = PromptLookupDrafter((1, 2, 3, 4, 5, 6, 7, 2, 3, 4))
    assert lookup.propose(0.01) == [5, 6, 7, 2, 3, 4], "half trusted, six tokens are right one time in 64"
    assert lookup.propose(0.1) == [5, 6, 7], "half trusted, three tokens are right one time in eight"
    lookup.add([9])
    assert lookup.propose(0.01) == []
    lookup.add([2, 3, 4])
    assert lookup.propose(0.01)[:2] == [9, 2], "what followed last"
    assert PromptLookupDrafter((1,)).propose(0.01) == []
    assert PromptLookupDrafter((1, 2, 3, 4) + (7, 8) * 4).propose(0.01) == [7, 8, 7, 8, 7, 8], "on and on"


def test_acceptance_follows_the_tokens():
    lookup = PromptLookupDrafter(tuple(range(8)) * 2)
    for _ in range(3):
        lookup.add(list(range(8)))
    assert lookup.acceptance > 0.99
    assert len(lookup.propose(0.5)) == MAX_DRAFTS, "much is ventured"
    for token in range(100, 110):
        lookup.add([0, 1, 2, 3])
        lookup.add([token])
    assert lookup.acceptance < 0.5
    acceptance = lookup.acceptance
    lookup.add([200])
    assert lookup.acceptance == acceptance, "no draft, nothing learnt"
    lookup.acceptance = 0.0  # as after thousands that were wrong
    lookup.add([0, 1, 2, 3])
    assert lookup.propose(0.01) == []


def test_the_more_sequences_the_surer_a_draft_must_be():
    assert 0 < min_confidence(1) < 0.1 < min_confidence(8) < min_confidence(256) < 1


@pytest.mark.skipif(cpu.capability() is None, reason=NOT_EXACT)
def test_drafts_for_many_sequences_cross_blocks_and_random_numbers():
    """Answers that repeat themselves, longer than the random numbers drawn at a time, 24 at once, and some watched."""
    model = a_model(GROUPED.replace(max_position_embeddings=400), sharper=16.0)
    convert(model, "int8")
    params = SamplingParams(temperature=0.3, max_tokens=300, seed=5, n=3, ignore_eos=True)
    plain = Engine(model).generate(PROMPTS, params)
    engine = Engine(model, speculative="ngram")
    requests = [
        engine.submit(prompt, replace(params, seed=5 + (i << 32)), streaming=i % 2 == 0)
        for i, prompt in enumerate(PROMPTS)
    ]
    while not all(request.done for request in requests):
        engine.step()
    samples = [sample for request in requests for sample in request.sequences]
    assert [s.tokens for s in samples] == [c.tokens for c in plain]
    for ours, theirs in zip(samples, plain, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert all(s.drafter is None for s in samples), "a look-up is not kept longer than it is used"
    counts = engine.status().counters
    assert counts.accepted_tokens > 0.4 * counts.draft_tokens > 0.1 * counts.generated_tokens, (
        "drafts were to be many and right"
    )
    assert engine.status().blocks_used == 0


def test_auto_is_lookup_where_weights_are_packed(monkeypatch):
    model = a_model(GROUPED)
    assert Engine(model, speculative="auto").speculative is None
    convert(model, "int8")
    assert Engine(model).speculative is None
    if cpu.capability() is not None:
        assert Engine(model, speculative="auto").speculative == "ngram"
    monkeypatch.setattr(cpu, "capability", lambda: None)
    assert Engine(model, speculative="auto").speculative is None, "other batch sizes would round otherwise"


@pytest.mark.parametrize("limit", [17, 30])
def test_a_step_has_so_many_tokens_at_most(monkeypatch, limit):
    monkeypatch.setattr(speculative, "MAX_TOKENS_WITH_DRAFTS", limit)
    engine, seen = Engine(a_model(GROUPED.replace(max_position_embeddings=400)), speculative="ngram"), []
    forward = ModelRunner.__call__
    monkeypatch.setattr(ModelRunner, "__call__", lambda *x: (seen.append(len(x[1])), forward(*x))[1])
    engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    assert max(seen) <= limit
    assert engine.status().counters.accepted_tokens > 0, "as soon as there is room"
