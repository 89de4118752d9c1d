"""Expert-parallel engines of other kinds, each with processes of its own, and their ends."""

import contextlib
from dataclasses import replace

import pytest
import torch

from helpers.reasoning_model import save_reasoner
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.expert_parallel import ExpertParallelEngine
from rorqual.errors import UserError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(5, 8 + 9 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_reasoner(tmp_path_factory.mktemp("shared") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_tokens_of_quantised_weights_are_those_of_one_process(directory, weights, monkeypatch):
    options = {"weights": weights, "dtype": torch.float32}
    with contextlib.closing(ExpertParallelEngine(directory, experts=2, redundant_experts=2, **options)) as engine:
        found = engine.generate(PROMPTS, GREEDY)
    # The fused step, which processes that share experts don't take, rounds in another order.
    monkeypatch.setattr("rorqual.engine.model_runner.fused_decode_step", lambda *_: None)
    expected = Engine(directory, **options).generate(PROMPTS, GREEDY)
    assert [c.tokens for c in found] == [c.tokens for c in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts = 1: give 2"),
        ({"experts": 3}, "redundant_experts = 0: 4 experts .* make it 2 or"),
        ({"experts": 2, "redundant_experts": -2}, "redundant_experts = -2: must be at least 0"),
        ({"experts": 2, "speculative": "mtp"}, "multi-token module"),
        ({"experts": 4, "device": "cuda"}, "each process needs a GPU, and there are 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(directory, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(ExpertParallelEngine, "_start", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(UserError, match=message):
        ExpertParallelEngine(directory, **options)


@pytest.mark.slow
def test_a_rank_that_ends_is_named_and_started_again(directory):
    with contextlib.closing(ExpertParallelEngine(directory, experts=2, dtype=torch.float32)) as engine:
        engine.submit([5, 6, 7], replace(GREEDY, max_tokens=500))
        engine.step()
        (process,) = engine._processes
        process.kill()
        process.join()
        with pytest.raises(UserError, match="rank"):
            engine.step()
        engine.reset()
        assert len(engine.generate(PROMPTS, GREEDY)) == 4
        assert engine._processes[0].pid != process.pid
