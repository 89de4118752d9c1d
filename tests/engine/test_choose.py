"""The compiled way to a row's next token does what the one array by array does."""

import copy

import pytest
import torch

from rorqual.engine import SamplingParams, choose
from rorqual.engine.rows import WINDOW, Request, Rows
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
    rows = Rows(16)
    for i, params in enumerate(WAYS):
        budget = params.thinking_budget is not None
        request = Request((1, 2), params, 6 + 40 * i, seed + i, (7, 8)[: i % 3], think_end=9 if budget else None)
        request.samples[0].blocks = [3, 4]
        rows.add(request.samples[0], 20)
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
        tokens, ended, some = choose.extend(compiled, at, logits)
        plain.prepare()
        expected, why = choose.extend_reference(plain, at, copy.deepcopy(logits))
        assert tokens.tolist() == expected.tolist()
        assert ended.tolist() == why.tolist()
        assert some == bool(why.any())
        assert (compiled.numbers == plain.numbers).all()
        made = int(plain.count.max())
        assert (compiled.tokens[:, :made] == plain.tokens[:, :made]).all()
        torch.testing.assert_close(
            torch.tensor(compiled.logprobs[:, :made]), torch.tensor(plain.logprobs[:, :made]), rtol=1e-4, atol=1e-4
        )
        reasons |= set(why.tolist())
        alive = [row for row, reason in zip(alive, why.tolist(), strict=True) if not reason]
        if not alive:
            break
    assert reasons == {0, choose.LENGTH, choose.TOKEN}


@pytest.mark.skipif(cpu.capability() is None, reason="without compiled kernels it is looked at every time")
def test_what_has_to_be_seen_to_is_said():
    rows = running(0)
    at = torch.tensor([1]).numpy()  # has no end before its 46th token
    choose.extend(rows, at, torch.zeros(1, WORDS))
    rows.lacking = False
    rows.count[1], rows.place[1] = 30, 30
    choose.extend(rows, at, torch.zeros(1, WORDS))
    assert not rows.lacking
    choose.extend(rows, at, torch.zeros(1, WORDS))  # the next is number 32 of a sequence with two blocks
    assert rows.lacking
    rows.count[1], rows.limit[1] = WINDOW - 1, 1000
    choose.extend(rows, at, torch.zeros(1, WORDS))
    assert rows.unready  # no random number left, nor room
    before = rows.uniform[1].copy()
    choose.extend(rows, at, torch.zeros(1, WORDS))
    assert (rows.uniform[1] != before).any()
    assert rows.tokens.shape[1] > WINDOW
