"""However requests meet in the batch and whatever the cache has room for, each gets what it would get alone."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.small_configs import DEVICES, GROUPED, LATENT, agree, greedy_by_full_batches, greedy_by_full_passes, logits
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.block_manager import BLOCK
from rorqual.engine.detokenizer import IncrementalDetokenizer, TokenDecoder
from rorqual.engine.paged_kv_cache import block_bytes
from rorqual.engine.prefill_queue import PrefillQueue
from rorqual.errors import UserError
from rorqual.model import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module", params=[LATENT, GROUPED], ids=["latent", "grouped"])
def model(request, device):
    torch.manual_seed(3)
    model = Transformer(request.param.replace(max_position_embeddings=200)).eval().to(device)
    with torch.no_grad():
        model.head_weight[0] = 0.6 * model.head_weight[1:].sum(0)
    return model


@pytest.fixture(scope="module")
def prompts():
    """Some begin the same way; lengths around those of blocks."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(1, 60, (40,), generator=generator).tolist()
    own = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (1, 15, 16, 17, 31, 70, 5, 33)]
    return own + [shared[:n] + own[i][:3] for i, n in ((3, 16), (4, 40), (5, 33), (7, 32))]


@pytest.fixture(scope="module")
def endless(model, prompts):
    """Greedy answers to the prompts by full passes: 40 tokens, whether or not the end token is among them."""
    return greedy_by_full_batches(model, prompts, 40)


@pytest.fixture(scope="module")
def answers(endless):
    """The same, up to the end token."""
    return [tokens[: tokens.index(0) + 1] if 0 in tokens else tokens for tokens in endless]


@pytest.fixture(scope="module")
def crowd(model):
    """33 prompts, and 24 tokens of the answer that each gets alone."""
    prompts = [[(7 * i + j * j) % 59 + 1 for j in range(1 + (5 * i) % 41)] for i in range(33)]
    params = replace(GREEDY, max_tokens=24, ignore_eos=True)
    return prompts, [Engine(model).generate([p], params)[0].tokens for p in prompts]


def bytes_for(model, blocks):
    return blocks * block_bytes(model.config, torch.float32)


def all_free(engine):
    return engine.status().blocks_used == 0


# Of these, those that are not slow have every pair of values.
COMPANIES = [(room, count, cache) for room in (None, 16, 9) for count in (7, 4096) for cache in (False, True)]
PAIRS = {(None, 7, True), (None, 4096, False), (16, 7, False), (16, 4096, True), (9, 7, True), (9, 4096, False)}


@pytest.mark.parametrize(
    ("room", "max_prefill_tokens", "prefix_cache"),
    [pytest.param(*case, marks=() if case in PAIRS else pytest.mark.slow) for case in COMPANIES],
)
def test_greedy_equals_full_passes_in_any_company(model, prompts, endless, prefix_cache, max_prefill_tokens, room):
    memory = None if room is None else bytes_for(model, room)
    engine = Engine(
        model, max_num_seqs=12, max_prefill_tokens=max_prefill_tokens, prefix_cache=prefix_cache, kv_cache_bytes=memory
    )
    for turn in range(1 + prefix_cache):
        found = engine.generate(prompts, replace(GREEDY, ignore_eos=True))
        assert [c.tokens for c in found] == endless
        if prefix_cache and turn and room is None:
            assert all(c.cached_tokens == (len(p) - 1) // BLOCK * BLOCK for c, p in zip(found, prompts, strict=True))
        assert all_free(engine)
    if room == 9:
        assert engine.status().counters.preemptions > 0, "the cache was to be too small"


@pytest.mark.parametrize("options", [{}, {"max_prefill_tokens": 7, "prefix_cache": True}, {"kv_cache_bytes": 30}])
def test_greedy_answers_are_the_same_alone_and_among_32_others(model, crowd, options):
    if "kv_cache_bytes" in options:
        options = {"kv_cache_bytes": bytes_for(model, options["kv_cache_bytes"])}
    prompts, alone = crowd
    params = replace(GREEDY, max_tokens=24, ignore_eos=True)
    engine = Engine(model, max_num_seqs=33, **options)
    for _ in range(2):
        assert [c.tokens for c in engine.generate(prompts, params)] == alone
    assert (engine.status().counters.preemptions > 0) == ("kv_cache_bytes" in options)
    assert all_free(engine)


@pytest.mark.parametrize("room", [None, 9])
def test_samples_do_not_depend_on_company_or_preemption(model, prompts, room):
    params = SamplingParams(n=3, seed=5, max_tokens=30, ignore_eos=True)
    memory = None if room is None else bytes_for(model, room)
    together = Engine(model, max_num_seqs=9, kv_cache_bytes=memory, max_prefill_tokens=20)
    found = [c.tokens for c in together.generate(prompts[:5], params)]
    wide = [c.tokens for c in Engine(model).generate(prompts[:5], params)]
    assert agree(found, wide, model)
    assert all_free(together)
    assert together.status().counters.preemptions > 0 or room is None


def test_the_newest_sequence_is_preempted_whatever_its_row(model, monkeypatch):
    """A finished sequence's row is taken by a newer one, so the last row is not the newest's."""
    preempted = []
    put_back = PrefillQueue.add_preempted
    monkeypatch.setattr(
        PrefillQueue, "add_preempted", lambda queue, s: (preempted.append(s.request), put_back(queue, s))
    )
    engine = Engine(model, max_num_seqs=3, kv_cache_bytes=bytes_for(model, 8))
    lengths = (4, 60, 60)
    prompts = [[i + 1] * BLOCK for i in range(3)]
    first, second, third = (
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True))
        for prompt, n in zip(prompts, lengths, strict=True)
    )
    while not engine.idle:
        engine.step()
    assert all(request.done for request in (first, second, third))
    assert preempted == [third]


def test_requests_with_different_wishes_share_a_batch(model, prompts):
    wishes = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(seed=2, top_p=0.7, temperature=0.8, n=2, max_tokens=9),
        SamplingParams(seed=3, repetition_penalty=1.3, min_p=0.05, max_tokens=20),
        SamplingParams(temperature=0, frequency_penalty=0.7, logit_bias=((4, 5.0),), max_tokens=20),
        SamplingParams(temperature=0, logprobs=3, max_tokens=6),
    ]

    def run(engine, which):
        requests = [engine.submit(prompts[i], wishes[i]) for i in which]
        while not engine.idle:
            engine.step()
        return [[engine.completion(s) for s in r.sequences] for r in requests]

    together = run(Engine(model, max_num_seqs=16), range(6))
    for i in range(6):
        (alone,) = run(Engine(model, max_num_seqs=16), [i])
        assert [c.tokens for c in alone] == [c.tokens for c in together[i]]
    (reported,) = together[5]
    for token, logprob, best in zip(reported.tokens, reported.logprobs, reported.top_logprobs, strict=True):
        assert len(best) == 3
        assert best[0] == (token, pytest.approx(logprob, abs=1e-5))
        assert best[0][1] >= best[1][1] >= best[2][1]


def test_penalties_and_biases_change_the_logits_as_defined(model):
    prompt = [7, 9, 7]
    plain = logits(model, [prompt])[0, -1]
    top = int(plain.argmax())

    def first(**wish):
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=60, ignore_eos=True, **wish)
        found = Engine(model).generate([prompt], params)[0]
        return found, [dict(place) for place in found.top_logprobs]

    def gap(place, a, b):
        return place[a] - place[b]

    a, b = [i for i in range(20, 30) if i != top][:2]
    _, (place, _) = first(logit_bias=((a, 2.5),))
    assert gap(place, a, b) == pytest.approx(float(plain[a] - plain[b]) + 2.5, abs=1e-4)
    _, (place, _) = first(repetition_penalty=2.0)
    seven = float(plain[7])
    assert gap(place, 7, b) == pytest.approx((seven / 2 if seven > 0 else seven * 2) - float(plain[b]), abs=1e-4)
    found, (_, unchanged) = first()
    then = logits(model, [[*prompt, found.tokens[0]]])[0, -1]
    made, other = found.tokens[0], a
    assert gap(unchanged, made, other) == pytest.approx(float(then[made] - then[other]), abs=1e-4)
    found, (_, place) = first(presence_penalty=0.5, frequency_penalty=0.25)
    assert found.tokens[0] == made
    assert gap(place, made, other) == pytest.approx(float(then[made] - then[other]) - 0.75, abs=1e-4)


def test_cancelling_frees_blocks_at_once_wherever_the_request_is(model, prompts, answers):
    rng = random.Random(0)
    for _ in range(10):
        engine = Engine(
            model,
            max_num_seqs=4,
            max_prefill_tokens=8,
            kv_cache_bytes=bytes_for(model, 24),
            prefix_cache=rng.random() < 0.5,
        )
        requests = {i: engine.submit(p, GREEDY) for i, p in enumerate(prompts)}
        gone = rng.sample(sorted(requests), 6)
        for i in gone:
            for _ in range(rng.randrange(4)):
                engine.step()
            engine.cancel(requests[i])
        while not engine.idle:
            engine.step()
        for i, request in requests.items():
            (sample,) = request.sequences
            assert sample.finish_reason is not None
            if i not in gone:
                assert sample.tokens == answers[i]
        assert all_free(engine)


def test_a_request_that_could_never_fit_is_refused(model):
    engine = Engine(model, kv_cache_bytes=bytes_for(model, 6))
    engine.generate([[5] * 30], SamplingParams(max_tokens=34))
    with pytest.raises(UserError, match="takes 65 tokens, but the KV cache holds 64"):
        engine.generate([[5] * 30], SamplingParams(max_tokens=35))


def test_the_cache_takes_what_was_stated(model):
    memory = bytes_for(model, 11) + 5
    engine = Engine(model, kv_cache_bytes=memory)
    engine.generate([[5] * 30], SamplingParams(max_tokens=5))
    assert memory - bytes_for(model, 1) < engine.status().kv_cache_bytes <= memory


def test_forgetting_lets_new_weights_count(model, prompts):
    model = copy.deepcopy(model)
    engine = Engine(model, prefix_cache=True)
    engine.generate(prompts, GREEDY)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(1.3)
    engine.reset_prefix_cache()
    assert [c.tokens for c in engine.generate(prompts, GREEDY)] == [
        greedy_by_full_passes(model, p, 40)[0] for p in prompts
    ]


def test_many_ways_to_sample_do_not_pile_up(model):
    engine = Engine(model, max_num_seqs=3)
    for i in range(12):
        request = engine.submit([5, 6], SamplingParams(temperature=1 + i / 10, seed=i, max_tokens=4))
        while not engine.idle:
            engine.step()
        alone = engine.completion(request.sequences[0])
        (wide,) = Engine(model).generate([[5, 6]], request.params)
        assert alone.tokens == wide.tokens
    assert len(engine._scheduler.batch._filters) <= 4


class Letters:
    """Token i is the letter 'a' + i % 26, but 59 and 58 are the two bytes of é."""

    eos_token_id = 0

    decoder = "ByteLevel"

    @property
    def backend_tokenizer(self):
        return self

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[ord(c) - 97 for c in text])

    def get_vocab(self):
        return {}

    def convert_ids_to_tokens(self, token):
        return "\u00c3" if token == 59 else "\u00a9" if token == 58 else chr(97 + token % 26)


def test_stop_strings_end_the_text_before_them_and_never_show(model, prompts):
    plain = Engine(model, Letters()).generate(prompts, replace(GREEDY, ignore_eos=True))
    for prompt, before in zip(prompts, plain, strict=True):
        stop = before.text[7:10]
        params = replace(GREEDY, ignore_eos=True, stop=(stop, "#"))
        (found,) = Engine(model, Letters()).generate([prompt], params)
        assert found.text == before.text[: before.text.index(stop)]
        assert found.finish_reason == "stop"
        assert len(found.tokens) < len(before.tokens)
        assert "".join(Engine(model, Letters()).stream(prompt, params)) == found.text


def test_text_comes_in_whole_characters():
    stream = IncrementalDetokenizer(TokenDecoder(Letters()), stop=("nop",))
    tokens, shown = [], []
    for t in [1, 59, 58, 13, 14, 2, 59, 13, 14, 15, 3]:
        tokens.append(t)
        stream.feed(tokens)
        shown.append(stream.take().text)
    assert shown == ["b", "", "é", "", "", "noc", "", "\ufffd", "", "", ""]
    assert stream.stopped
    assert stream.text == "bénoc\ufffd"


def test_generating_does_not_mistake_what_others_submitted_for_its_own(model, prompts):
    engine = Engine(model, max_num_seqs=8)
    other = engine.submit(prompts[0], replace(GREEDY, max_tokens=3, ignore_eos=True))
    found = engine.generate(prompts[1:4], GREEDY)
    assert [c.tokens for c in found] == [greedy_by_full_passes(model, p, 40)[0] for p in prompts[1:4]]
    assert engine.completion(other.sequences[0]).tokens == greedy_by_full_passes(model, prompts[0], 3, True)[0]


def test_streaming_text_needs_a_tokenizer(model):
    with pytest.raises(UserError, match="no tokenizer"):
        next(Engine(model).stream([5, 6]))
