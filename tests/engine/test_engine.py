"""Batched generation says what one forward pass after another would say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.small_configs import DEVICES, GROUPED, LATENT, agree, greedy_by_full_passes, logits
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.kernels.sample import SamplingFilter, sample
from rorqual.model import Transformer


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=[LATENT, GROUPED], ids=["latent", "grouped"])
def model(request, device):
    torch.manual_seed(3)
    model = Transformer(request.param).eval().to(device)
    with torch.no_grad():  # make the end token likely now and then, so that sequences leave at different times
        model.head_weight[0] = 0.8 * model.head_weight[1:].sum(0)
    return model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 5, 9, 2, 7, 7, 3, 1, 6, 4]
    return [torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths]


def test_greedy_equals_full_passes_however_few_the_slots(model, prompts):
    expected = [greedy_by_full_passes(model, p, 12) for p in prompts]
    assert len({len(tokens) for tokens, _ in expected}) > 1, "some should end early, or nothing leaves the batch"
    for slots in (1, 3, 64):
        found = Engine(model, max_num_seqs=slots).generate(prompts, SamplingParams(temperature=0, max_tokens=12))
        for completion, (tokens, logprobs) in zip(found, expected, strict=True):
            assert completion.tokens == tokens
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert completion.finish_reason == ("stop" if tokens[-1] == 0 else "length")


def test_samples_of_a_prompt_are_neighbours_and_differ(model, prompts):
    found = Engine(model, max_num_seqs=5).generate(prompts[:3], SamplingParams(n=4, max_tokens=8, seed=1))
    assert len(found) == 12
    assert len({tuple(c.tokens) for c in found[4:8]}) > 1
    for i, completion in enumerate(found):
        whole = prompts[i // 4] + completion.tokens
        logp = logits(model, [whole])[0].log_softmax(-1)
        at = len(prompts[i // 4]) - 1
        expected = [float(logp[at + j, token]) for j, token in enumerate(completion.tokens)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_seed_decides_and_slots_do_not(model, prompts):
    def run(seed, slots):
        found = Engine(model, max_num_seqs=slots).generate(prompts, SamplingParams(n=2, max_tokens=10, seed=seed))
        return [c.tokens for c in found]

    assert run(7, 20) == run(7, 20)
    assert agree(run(7, 20), run(7, 3), model)
    assert run(7, 20) != run(8, 20)


def test_every_prompt_and_sample_draws_its_own_numbers():
    """The same prompt forty times over is forty independent answers, whichever of the two ways they are asked for."""
    torch.manual_seed(3)
    model = Transformer(LATENT)
    params = SamplingParams(seed=7, max_tokens=8, ignore_eos=True)
    prompts = Engine(model).generate([[1, 2, 3]] * 40, params)
    samples = Engine(model).generate([[1, 2, 3]], SamplingParams(seed=7, max_tokens=8, ignore_eos=True, n=40))
    for answers in (prompts, samples):
        assert len({tuple(c.tokens) for c in answers}) > 35
        assert len({c.tokens[0] for c in answers}) > 8


def test_context_bounds_the_answer(model):
    found = Engine(model).generate([[5] * 36], SamplingParams(temperature=0, max_tokens=50))
    assert len(found[0].tokens) <= 4
    with pytest.raises(UserError, match="40 tokens, but the model's context holds 40"):
        Engine(model).generate([[5] * 40])
    with pytest.raises(UserError, match="prompt 2 is empty"):
        Engine(model).generate([[5], []])


def test_stop_tokens_end_a_sequence(model, prompts):
    plain = Engine(model).generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    stop = next(c.tokens[2] for c in plain if len(c.tokens) > 3)
    found = Engine(model).generate(prompts, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,)))
    for before, after in zip(plain, found, strict=True):
        cut = before.tokens.index(stop) + 1 if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]


class ThinkTokenizer:
    """Just enough: token 42 is </think>."""

    eos_token_id = 0

    decoder = None

    @property
    def backend_tokenizer(self):
        return self

    def get_vocab(self):
        return {"</think>": 42}

    truncation = padding = None

    def __call__(self, text, add_special_tokens=False):
        return SimpleNamespace(input_ids=[42] if text == "</think>" else [1, 2])

    def encode_batch_fast(self, texts, add_special_tokens):
        return [SimpleNamespace(ids=self(text).input_ids) for text in texts]

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def test_thinking_budget_closes_the_thinking(model, prompts):
    engine = Engine(model, ThinkTokenizer(), max_num_seqs=4)
    for budget in (0, 3):
        found = engine.generate(prompts, SamplingParams(n=3, seed=2, max_tokens=12, thinking_budget=budget))
        for c in found:
            if len(c.tokens) > budget:
                assert 42 in c.tokens[: budget + 1]
        assert any(len(c.tokens) > budget + 1 for c in found), "the answer goes on after the thinking"


def test_a_cache_of_8_bits_takes_half_the_memory_and_hardly_changes_an_answer(prompts):
    torch.manual_seed(3)
    model = Transformer(GROUPED.replace(head_dim=32)).eval()
    params = SamplingParams(temperature=0, max_tokens=20)
    exact, small = (Engine(model, kv_cache_dtype=dtype, max_prefill_tokens=4) for dtype in (None, torch.int8))
    assert small.block_bytes / exact.block_bytes == 34 / 32 / 4, "FP32 here"
    differences = []
    for a, b in zip(exact.generate(prompts, params), small.generate(prompts, params), strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))
        differences += [abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True)]
    assert len(differences) > 60
    assert 0 < max(differences) < 0.05


def test_latent_attention_has_no_cache_of_8_bits():
    with pytest.raises(UserError, match="use --kv-cache-dtype fp8"):
        Engine(Transformer(LATENT), kv_cache_dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_a_cache_of_another_dtype_is_refused(dtype):
    with pytest.raises(UserError, match=f"kv_cache_dtype = {dtype}: must be torch.float32"):
        Engine(Transformer(LATENT), kv_cache_dtype=dtype)


def test_stream_says_what_generate_says(model):
    engine = Engine(model, ThinkTokenizer())
    params = SamplingParams(max_tokens=9, seed=4, ignore_eos=True)
    pieces = list(engine.stream("x", params))
    assert "".join(pieces) == engine.generate(["x"], params)[0].text
    assert len(pieces) > 1


def test_sampling_follows_the_distribution_it_is_cut_to():
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).expand(40_000, 5)
    p = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]).softmax(-1)
    for params, kept in (
        (SamplingParams(), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=2), [0, 1]),
        (SamplingParams(top_p=float(p[0]) + 1e-4), [0, 1]),
        (SamplingParams(top_p=0.05), [0]),
        (SamplingParams(min_p=0.2), [0, 1, 4]),  # e⁻¹·⁵ = .22 of the most probable, e⁻² = .14
        (SamplingParams(min_p=0.2, top_k=2), [0, 1]),
    ):
        tokens, logprobs = sample(logits, params.filter, torch.rand(40_000))
        share = torch.bincount(tokens, minlength=5) / 40_000
        expected = torch.zeros(5)
        expected[kept] = p[kept] / p[kept].sum()
        assert (share - expected).abs().max() < 0.01  # four standard deviations
        torch.testing.assert_close(logprobs, p[tokens].log())
    hot, _ = sample(logits, SamplingFilter(100.0), torch.rand(40_000))
    assert (torch.bincount(hot, minlength=5) / 40_000 - 0.2).abs().max() < 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_tokens": 0}, {"n": 0}, {"min_p": 1},
        {"repetition_penalty": 0}, {"presence_penalty": float("nan")}, {"logprobs": -1}, {"stop": ("",)},
        {"temperature": "0.5"}, {"temperature": True}, {"n": 1.5}, {"n": "2"}, {"seed": "a"}, {"stop": (1,)},
        {"stop": 5}, {"stop_token_ids": (1 << 70,)}, {"stop_token_ids": 5}, {"logit_bias": {"5": 1}},
        {"logit_bias": [5]}, {"grammar": "a"},
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_parameters_as_they_are_usually_written():
    written = {
        "stop": "END", "stop_token_ids": [5], "logit_bias": {7: 1}, "n": 2.0, "temperature": np.float32(0.5),
        "seed": np.int64(3), "top_k": None, "max_tokens": None,
    }  # fmt: skip
    assert SamplingParams(**written) == SamplingParams(
        temperature=0.5, n=2, seed=3, stop=("END",), stop_token_ids=(5,), logit_bias=((7, 1.0),)
    )


def test_prompts_as_they_are_usually_written(model):
    params = SamplingParams(temperature=0.0, max_tokens=3)
    engine = Engine(model)
    ids = [3, 5, 7]
    (wanted,) = engine.generate([ids], params)
    for written in (ids, [np.array(ids)], np.array([ids]), torch.tensor([ids]), [torch.tensor(ids)], (tuple(ids),)):
        assert engine.generate(written, params) == [wanted]
    assert engine.generate([], params) == engine.generate(np.zeros((0, 3)), params) == []
    for wrong in ([None], [[1.5]], [b"ab"], [["a"]], [5.0]):
        with pytest.raises(UserError, match="prompt 1 must be text or token ids"):
            engine.generate(wrong, params)


@pytest.mark.parametrize(
    "wrong", [{"max_num_seqs": 0}, {"max_prefill_tokens": 0}, {"kv_cache_bytes": -1}, {"speculative": "guess"}]
)
def test_an_engine_that_could_make_nothing_is_refused(model, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Engine(model, **wrong)


def test_a_cache_of_nothing_holds_nothing(model):
    with pytest.raises(UserError, match="the KV cache holds 0"):
        Engine(model, kv_cache_bytes=0).generate([[3, 5]], SamplingParams(max_tokens=3))


def test_every_seed_is_one_of_its_own(model):
    """Also beyond 63 bits, where NumPy would make floats of them."""
    engine = Engine(model)
    seeds = (-1, -2, (1 << 63) + 1, (1 << 63) + 2, 1)
    said = {s: engine.generate([[3]], SamplingParams(seed=s, max_tokens=20, ignore_eos=True))[0].tokens for s in seeds}
    assert len({tuple(tokens) for tokens in said.values()}) == len(seeds)
