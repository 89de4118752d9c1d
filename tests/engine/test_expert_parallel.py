"""An engine on several processes against the engine of one: the same tokens, whoever computes them."""

from dataclasses import replace

import pytest
import torch

from helpers.reasoning_model import save_reasoner
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.expert_parallel import ExpertParallelEngine

OPTIONS = {"dtype": torch.float32, "max_num_seqs": 4, "kv_cache_bytes": 1 << 20, "prefix_cache": True}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_reasoner(tmp_path_factory.mktemp("shared") / "tiny")


@pytest.fixture(scope="module")
def alone(directory):
    return Engine(directory, **OPTIONS)


@pytest.fixture(scope="module")
def together(directory):
    """Two processes; 4 experts and 2 copies."""
    engine = ExpertParallelEngine(directory, experts=2, redundant_experts=2, rebalance_seconds=None, **OPTIONS)
    yield engine
    engine.close()


def prompts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 250, (3 + 11 * i,), generator=generator).tolist() for i in range(count)]


def same(found, expected):
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.text for c in found] == [c.text for c in expected]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    logprobs = [torch.tensor([p for c in some for p in c.logprobs]) for some in (found, expected)]
    assert (logprobs[0] - logprobs[1]).abs().max() < 1e-4


def test_tokens_are_those_of_one_process_also_after_experts_have_moved(alone, together):
    for seed, count in ((0, 1), (1, 12), (2, 5)):  # a rank without requests; more than run at a time; fewer
        asked = prompts(count, seed)
        same(together.generate(asked, GREEDY), alone.generate(asked, GREEDY))
        together.rebalance()
    assert together.status().expert_balance >= 1
    assert together.status().counters.generated_tokens == 12 * 18


def test_ranks_end_at_different_times_and_streams_have_their_text(alone, together):
    asked = prompts(4, 3)
    ran = {}
    for engine in (alone, together):
        requests = [
            engine.submit(prompt, replace(GREEDY, max_tokens=3 + 9 * i, stop="e" if i == 3 else ()))
            for i, prompt in enumerate(asked)
        ]
        while not engine.idle:
            engine.step()
        ran[engine] = [engine.completion(s) for request in requests for s in request.sequences]
    same(ran[together], ran[alone])


def test_sampling_is_by_seed_wherever_it_is_computed(alone, together):
    params = SamplingParams(temperature=1, max_tokens=8, n=3, seed=5, ignore_eos=True, logprobs=2)
    asked = prompts(3, 4)
    found, expected = together.generate(asked, params), alone.generate(asked, params)
    same(found, expected)
    assert [len(c.top_logprobs) for c in found] == [8] * 9


def test_a_prefix_is_found_where_it_was_served(together):
    together.reset_prefix_cache()
    long = prompts(9, 5)[-1]
    together.generate([long], GREEDY)
    together.generate([[7, 8, 9]], GREEDY)  # to the other rank
    (found,) = together.generate([long], GREEDY)
    assert found.cached_tokens == (len(long) - 1) // 16 * 16


def test_cancelled_requests_free_their_blocks_on_every_rank(together):
    requests = [together.submit(prompt, replace(GREEDY, max_tokens=500)) for prompt in prompts(6, 6)]
    for _ in range(3):
        together.step()
    assert together.status().running == 6
    for request in requests:
        together.cancel(request)
    together.generate([[5, 6]], GREEDY)
    status = together.status()
    assert (status.running, status.waiting, status.blocks_used) == (0, 0, 0)
