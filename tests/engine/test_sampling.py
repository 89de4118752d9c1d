"""The compiled way to a row's next token does what the one array by array does."""

import copy

import pytest
import torch

from rorqual.engine import SamplingParams, sampling
from rorqual.engine.batch import WINDOW, DecodeBatch
from rorqual.engine.sequence import Request
from rorqual.kernels import cpu

WORDS = 300
WAYS = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.6, top_p=0.95),
    SamplingParams(top_k=5),
    SamplingParams(min_p=0.1, temperature=1.5),
    SamplingParams(temperature=0.7, thinking_budget=4),
)


def running(seed):
    rows = DecodeBatch(16)
    for i, params in enumerate(WAYS):
        budget = params.thinking_budget is not None
        request = Request((1, 2), params, 6 + 40 * i, seed + i, (7, 8)[: i % 3], think_end_token=9 if budget else None)
        request.sequences[0].blocks = [3, 4]
        rows.add(request.sequences[0], 20)
    return rows


@pytest.mark.skipif(cpu.capability() is None, reason="nothing is compiled")
@pytest.mark.parametrize("seed", range(4))
def test_rows_grow_by_the_same_tokens(seed):
    compiled, plain = running(seed), running(seed)
    generator = torch.Generator().manual_seed(seed)
    alive, reasons = list(range(len(WAYS))), set()
    for _ in range(WINDOW + 20):
        at = torch.tensor(alive).numpy()
        logits = 3 * torch.randn(len(at), WORDS, generator=generator)
        tokens, ended, some = sampling.sample_and_append(compiled, at, logits)
        plain.prepare()
        expected, why = sampling.sample_and_append_reference(plain, at, copy.deepcopy(logits))
        assert tokens.tolist() == expected.tolist()
        assert ended.tolist() == why.tolist()
        assert some == bool(why.any())
        assert (compiled.numbers == plain.numbers).all()
        made = int(plain.num_tokens.max())
        assert (compiled.tokens[:, :made] == plain.tokens[:, :made]).all()
        torch.testing.assert_close(
            torch.tensor(compiled.logprobs[:, :made]), torch.tensor(plain.logprobs[:, :made]), rtol=1e-4, atol=1e-4
        )
        reasons |= set(why.tolist())
        alive = [row for row, reason in zip(alive, why.tolist(), strict=True) if not reason]
        if not alive:
            break
    assert reasons == {0, sampling.LENGTH_REACHED, sampling.STOP_TOKEN}


@pytest.mark.skipif(cpu.capability() is None, reason="without compiled kernels it is looked at every time")
def test_what_has_to_be_seen_to_is_said():
    rows = running(0)
    at = torch.tensor([1]).numpy()  # has no end before its 46th token
    sampling.sample_and_append(rows, at, torch.zeros(1, WORDS))
    rows.needs_blocks = False
    rows.num_tokens[1], rows.position[1] = 30, 30
    sampling.sample_and_append(rows, at, torch.zeros(1, WORDS))
    assert not rows.needs_blocks
    sampling.sample_and_append(rows, at, torch.zeros(1, WORDS))  # the next is number 32 of a sequence with two blocks
    assert rows.needs_blocks
    rows.num_tokens[1], rows.max_new_tokens[1] = WINDOW - 1, 1000
    sampling.sample_and_append(rows, at, torch.zeros(1, WORDS))
    assert rows.needs_prepare  # no random number left, nor room
    before = rows.uniforms[1].copy()
    sampling.sample_and_append(rows, at, torch.zeros(1, WORDS))
    assert (rows.uniforms[1] != before).any()
    assert rows.tokens.shape[1] > WINDOW
