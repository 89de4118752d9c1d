import random

import pytest
import torch

from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.model.router_hooks import NOT_RECORDED
from rorqual.rl.rollout_packing import branch_mask, pack_rollout, routing_table


def lengthless(_):
    return 1.0


def random_groups(groups, each, vocab, seed=0, longest=20):
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab) for _ in range(rng.randrange(2, 8))] for _ in range(groups)]
    completions = [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest))] for _ in range(groups * each)]
    return prompts, completions, [i // each for i in range(groups * each)]


def separate_logprobs(model, prompt, completion):
    """The plain way: one sequence, shifted by one."""
    tokens = torch.tensor([prompt + completion])
    logp = model.logits(tokens)[0].log_softmax(-1)
    return [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


def packed_logprobs(model, batches, total):
    found, seen = torch.full((total,), float("nan")), 0
    for rows in batches:
        hidden = model(rows.tokens, rows.positions, rows.mask).flatten(0, 1)
        logprobs, _ = token_logprobs(hidden[rows.source], model.head_weight, rows.targets)
        found[rows.offset] = logprobs
        seen += len(rows.offset)
    assert seen == total
    return found


@pytest.mark.parametrize("network", ["dense", "moe"])
@pytest.mark.parametrize("micro_tokens", [64, 4096])
@torch.no_grad()
def test_packed_is_the_same_as_apart(network, micro_tokens, request):
    model = request.getfixturevalue(network)
    prompts, completions, prompt_of = random_groups(5, 4, model.config.vocab_size)
    expected = [separate_logprobs(model, prompts[p], c) for p, c in zip(prompt_of, completions, strict=True)]
    flat = torch.tensor([x for row in expected for x in row])
    batches = pack_rollout(prompts, completions, prompt_of, micro_tokens, lengthless)
    assert (packed_logprobs(model, batches, len(flat)) - flat).abs().max() < 1e-5


def test_gradients_are_the_same_as_apart(dense):
    prompts, completions, prompt_of = random_groups(3, 3, dense.config.vocab_size, seed=2)
    weights = torch.randn(sum(map(len, completions)), generator=torch.Generator().manual_seed(0))
    (
        packed_logprobs(dense, pack_rollout(prompts, completions, prompt_of, 4096, lengthless), len(weights)) @ weights
    ).backward()
    packed = {n: p.grad.clone() for n, p in dense.named_parameters()}
    dense.zero_grad()
    at = 0
    for p, c in zip(prompt_of, completions, strict=True):
        logp = dense.logits(torch.tensor([prompts[p] + c]))[0].log_softmax(-1)
        chosen = logp[len(prompts[p]) - 1 : -1].gather(1, torch.tensor(c)[:, None])[:, 0]
        (chosen @ weights[at : at + len(c)]).backward()
        at += len(c)
    for name, parameter in dense.named_parameters():
        assert torch.allclose(packed[name], parameter.grad, atol=1e-4), name


def shapes(rows):
    """[blocks, tokens of each]"""
    return [tuple(mask.shape[::3]) for mask in rows.mask]


def test_a_prompt_stands_once_where_its_group_fits():
    prompts, completions = [[1] * 50], [[2] * 11 for _ in range(8)]
    rows = pack_rollout(prompts, completions, [0] * 8, 4096, lengthless)
    assert len(rows) == 1
    assert rows[0].tokens.shape == (1, 144)  # 50 + 8·10, as a completion's last token is only a target, filled up
    assert (rows[0].tokens == 1).sum() == 50


def test_costly_attention_makes_short_blocks():
    prompts, completions, prompt_of = random_groups(8, 8, 99, longest=40)
    cheap = pack_rollout(prompts, completions, prompt_of, 4096, lengthless)
    dear = pack_rollout(prompts, completions, prompt_of, 4096, lambda length: float(length**2))
    assert max(t for r in dear for _, t in shapes(r)) < max(t for r in cheap for _, t in shapes(r))


def test_blocks_of_a_length_stand_together():
    completions = [[2] * 12] * 16 + [[2] * 25] * 8
    rows = pack_rollout([[1] * 50] * 3, completions, [i // 8 for i in range(24)], 4096, lengthless)
    assert [shapes(r) for r in rows] == [[(1, 256), (2, 144)]]


def test_a_group_is_split_where_that_is_cheapest():
    """A token costs its block's length: two of 50 + 4·10, filled up to 96, are cheaper than one of 144."""
    rows = pack_rollout([[1] * 50], [[2] * 11] * 8, [0] * 8, 4096, lambda length: float(length))
    assert [shapes(r) for r in rows] == [[(2, 96)]]


def test_micro_batches_keep_to_their_budget():
    prompts, completions, prompt_of = random_groups(20, 4, 99)
    batches = pack_rollout(prompts, completions, prompt_of, 300, lengthless)
    assert len(batches) > 1
    assert all(r.tokens.numel() <= 300 for r in batches)
    places = torch.cat([r.offset for r in batches]).sort().values
    assert places.tolist() == list(range(sum(map(len, completions))))


def test_a_group_longer_than_the_budget_is_split():
    batches = pack_rollout([[1] * 50], [[2] * 31] * 6, [0] * 6, 128, lengthless)
    assert [shapes(r) for r in batches] == [[(1, 112)]] * 3


def test_a_sequence_longer_than_the_budget_gets_a_block_of_its_own():
    batches = pack_rollout([[1] * 90], [[2] * 31] * 2, [0, 0], 64, lengthless)
    assert [shapes(r) for r in batches] == [[(1, 128)]] * 2


def test_completions_of_one_token_beyond_the_budget():
    batches = pack_rollout([[1] * 100], [[2] * 41, [3], [3]], [0] * 3, 128, lambda length: float(length))
    assert sorted(x for r in batches for x in r.offset.tolist()) == list(range(43))
    assert [shapes(r) for r in batches] == [[(1, 144)], [(1, 112)]]


def test_branch_mask_by_hand():
    branches = torch.tensor([[0, 0, 1, 2, -1, -1]])
    assert branch_mask(branches)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_recorded_experts_reach_their_tokens():
    """Each token's record is its own id, in 2 layers of 1 expert."""
    prompts, completions, prompt_of = [[3, 4], [5], [6, 7, 8]], [[10, 11], [12], [13, 14, 15], [16, 17]], [0, 0, 2, 2]
    ids = [prompts[p] + c[:-1] for c, p in zip(completions, prompt_of, strict=True)]
    routing = [torch.tensor(own, dtype=torch.int16).view(-1, 1, 1).expand(-1, 2, 1) for own in ids]
    table = routing_table(prompts, routing, prompt_of)
    for packed in pack_rollout(prompts, completions, prompt_of, 32, lambda _: 1.0):
        recorded = table[packed.origin]
        real = packed.origin >= 0
        assert recorded.shape == (packed.tokens.shape[1], 2, 1)
        assert torch.equal(recorded[real][:, 1, 0].long(), packed.tokens[0, real])
        assert (recorded[~real] == NOT_RECORDED).all()
