import numpy as np
import pytest
import torch

from rorqual.kernels.allowed_tokens import AllowedTokens, allowed_tokens, drop_others_, pack, words_of
from rorqual.kernels.cross_entropy import token_logprobs, token_logprobs_reference
from rorqual.kernels.sample import SamplingFilter

FILTERS = [
    SamplingFilter(1.0, top_p=0.9),
    SamplingFilter(0.7, top_k=7),
    SamplingFilter(1.3, min_p=0.1),
    SamplingFilter(1.0, top_p=0.8, top_k=40, min_p=0.02),
    SamplingFilter(1.0),
]


def by_hand(logits, filter):
    """One row, token by token from the most probable one, in float64."""
    p = np.exp(logits / filter.temperature - np.max(logits / filter.temperature))
    p /= p.sum()
    kept, mass = set(), 0.0
    for rank, token in enumerate(np.argsort(-p, kind="stable")):
        enough = filter.top_p < 1 and mass >= filter.top_p
        if enough or (filter.top_k and rank >= filter.top_k) or p[token] < filter.min_p * p.max():
            break
        kept.add(int(token))
        mass += p[token]
    return kept


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])  # the flattest need more than the first look
def test_allowed_tokens_by_hand(filter, spread):
    logits = spread * torch.randn(6, 1500, generator=torch.Generator().manual_seed(1))
    allowed = allowed_tokens(logits, filter)
    for row, found in zip(logits.double().numpy(), allowed, strict=True):
        difference = set(found.nonzero().flatten().tolist()) ^ by_hand(row, filter)
        assert len(difference) <= (filter.top_p < 1)  # sums of float32 may reach top_p one token later


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(4, 3000) * torch.tensor([[0.01], [1.0], [5.0], [0.5]])
    filter = SamplingFilter(1.0, top_p=0.95)
    whole = allowed_tokens(logits, filter)
    assert all(torch.equal(whole[i], allowed_tokens(logits[i : i + 1], filter)[0]) for i in range(4))


@pytest.mark.parametrize("vocab", [64, 77, 1000])
def test_packed_sets_come_back(vocab):
    generator = torch.Generator().manual_seed(vocab)
    sets = torch.rand(9, vocab, generator=generator) < torch.linspace(0, 1, 9)[:, None]
    rows = pack(sets)
    assert all(len(row) <= words_of(vocab) for row in rows)
    kept = AllowedTokens.of(rows, vocab)
    assert torch.equal(kept.mask(torch.arange(9)), sets)
    assert torch.equal(kept.mask(torch.tensor([8, 0, 3])), sets[[8, 0, 3]])
    parts = kept.split([2, 0, 7])
    assert torch.equal(parts[2].mask(torch.arange(7)), sets[2:])
    assert torch.equal(AllowedTokens.joined(parts).mask(torch.arange(9)), sets)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_log_probabilities_among_the_allowed_tokens(known, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (12,))
    allowed = (torch.rand(12, 50) < 0.2).scatter(1, targets[:, None], True)
    slopes = torch.randn(12)
    found, entropy = token_logprobs(
        hidden, weight, targets, temperature, slopes if known else None, allowed=lambda rows: allowed[rows]
    )
    expected, expected_entropy = token_logprobs_reference(hidden, weight, targets, temperature, allowed)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(entropy, expected_entropy, atol=1e-5)
    gradients = torch.autograd.grad(found, (hidden, weight), slopes)
    wanted = torch.autograd.grad(expected, (hidden, weight), slopes)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, wanted, strict=True))


def test_dropped_logits_stay_finite():
    logits = torch.tensor([[3.0, 1.0, -2.0]])
    drop_others_(logits, torch.tensor([[False, True, True]]), temperature=0.5)
    assert logits.tolist() == [[1.0 - 50.0, 1.0, -2.0]]
