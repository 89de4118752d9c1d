"""What one client asks for must not hold up the others: counted, not timed."""

import asyncio
import threading

import httpx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import adjust
from rorqual.serve.background import LONG, kind_of, run_in_background


def test_a_text_is_scored_between_the_steps_of_others(directory):
    engine = Engine(directory, max_num_seqs=4, kv_cache_bytes=1 << 21, max_prefill_tokens=16, prefix_cache=True)
    tokens = engine.tokenizer("what is 12 and 7? the sum of both " * 12, add_special_tokens=False).input_ids
    whole = PromptLogprobs(tuple(tokens), engine.model.head_weight, 2)
    with torch.inference_mode():
        whole.append(engine.model(torch.tensor([tokens]))[0], 0)
    other = engine.submit([5, 6, 7], SamplingParams(max_tokens=500, ignore_eos=True))
    engine.step()
    for _ in range(2):  # the second time it lies in the cache, and is read all the same
        before = engine.status().counters.generated_tokens
        scored, steps = engine.score(tokens, 2), 0
        while not scored.done:
            engine.step()
            steps += 1
        assert steps >= len(tokens) // 16
        assert engine.status().counters.generated_tokens - before == steps
        assert scored.prompt_logprobs.logprobs[0] is None
        assert scored.prompt_logprobs.logprobs[1:] == pytest.approx(whole.logprobs[1:], abs=1e-4)
        assert [[t for t, _ in r] for r in scored.prompt_logprobs.ranked] == [[t for t, _ in r] for r in whole.ranked]
    left = engine.score(tokens, 2)
    engine.step()
    engine.cancel(left)
    engine.cancel(other)
    assert engine.status().blocks_used == 0
    assert engine.idle


def test_a_text_that_gave_its_blocks_back_is_scored_once(directory):
    memory = 9 * Engine(directory).block_bytes  # of which one is spare
    engine = Engine(directory, max_num_seqs=4, kv_cache_bytes=memory, max_prefill_tokens=8)
    tokens = [3 + i % 50 for i in range(60)]
    engine.submit([5, 6, 7], SamplingParams(n=3, max_tokens=20, ignore_eos=True, seed=0))
    for _ in range(8):
        engine.step()
    scored = engine.score(tokens, 1)  # four blocks, two of which the three sequences want before it is through
    while not scored.done:
        engine.step()
    assert engine.status().counters.preemptions == 1
    assert engine.idle, "it was scored after the others"
    again = engine.score(tokens, 1)
    while not again.done:
        engine.step()
    assert engine.status().counters.preemptions == 1
    assert scored.prompt_logprobs.logprobs[1:] == pytest.approx(again.prompt_logprobs.logprobs[1:], abs=1e-5)
    assert len(scored.prompt_logprobs.ranked) == len(tokens)


def test_a_grammar_is_compiled_once_and_not_by_the_engine(server, monkeypatch):
    by = []
    compile_ = GrammarCompiler.compile
    monkeypatch.setattr(
        GrammarCompiler, "compile", lambda *a: (by.append(threading.current_thread().name), compile_(*a))[1]
    )  # fmt: skip
    body = {"prompt": ["what", "is", "7"], "n": 2, "max_tokens": 8, "structured_outputs": {"regex": "[0-9]{3}"}}
    answer = httpx.post(server.url + "/v1/completions", json=body).json()
    assert all(c["text"].isdigit() for c in answer["choices"])
    assert len(by) == 1
    assert by[0].startswith("grammar")
    body["structured_outputs"] = {"regex": "a" * 200_000}
    assert httpx.post(server.url + "/v1/completions", json=body).status_code == 400
    assert len(by) == 1


def test_a_short_text_does_not_wait_for_a_long_one():
    go = threading.Event()

    async def both():
        long = asyncio.ensure_future(run_in_background(lambda: go.wait(60), kind_of(LONG + 1)))
        assert await run_in_background(lambda: "read", kind_of(10)) == "read"
        assert not long.done()
        go.set()
        assert await long

    asyncio.run(both())


class Counted(TorchDispatchMode):
    """Operations, and the numbers they gave."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def test_penalties_and_biases_cost_a_token_the_same_however_many():
    def operations(params):
        params.adjusts and adjust(torch.zeros(2000), params, torch.arange(5), torch.arange(3))  # made once
        with Counted() as found:
            adjust(torch.zeros(2000), params, torch.arange(5), torch.arange(3))
        return found.operations

    few, many = (SamplingParams(logit_bias=tuple((i, 1.0) for i in range(n))) for n in (1, 1000))
    assert operations(few) == operations(many)


def test_penalties_are_what_they_say():
    logits = torch.tensor([1.0, -1.0, 2.0, 3.0, 0.5])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 1.0), (0, -2.0))
    )
    found = adjust(logits, params, torch.tensor([0]), torch.tensor([1, 2, 2, 1, 2]))
    # Token 0 is the prompt's, 1 was made twice and 2 three times.
    assert found.tolist() == pytest.approx([0.5 - 2, -2 - 0.5 - 0.5, 1 - 0.5 - 0.75, 3.0, 1.5])
