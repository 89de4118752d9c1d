"""Losses against plain loops over Python numbers, written from the papers' formulas."""

import math

import numpy as np
import pytest
import torch

from rorqual.recipe import GRPOSection
from rorqual.rl.grpo import grpo_loss, kl_estimate, off_policy_masked, sequence_means, token_weights
from rorqual.rl.mismatch import importance_weights

SEQUENCE = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
LENGTHS = [2, 4, 3, 1]
ADVANTAGES = [1.3, -0.7, 0.4, -1.0]
LIMIT = 6


def numbers(seed=0):
    """log π, log π_old, log π_ref of 10 tokens, apart enough that clips bite."""
    random = np.random.default_rng(seed)
    old = -random.uniform(0.2, 2.0, 10)
    return old + random.normal(0, 0.5, 10), old, old + random.normal(0, 0.3, 10)


def section(algorithm, **fields):
    return GRPOSection(algorithm=algorithm, **fields)


def clip(x, low, high):
    return min(max(x, low), high)


def by_hand(algorithm, logp, old, ref, s):
    """−J of each paper."""
    outputs = [[t for t in range(10) if SEQUENCE[t] == i] for i in range(4)]
    total = 0.0
    for i, tokens in enumerate(outputs):
        A = ADVANTAGES[i]
        if algorithm == "gspo":  # 2507.18071, eq. 5 and 7
            ratio = math.exp(sum(logp[t] - old[t] for t in tokens) / len(tokens))
            total += min(ratio * A, clip(ratio, 1 - 3e-4, 1 + 4e-4) * A) / 4
            continue
        for t in tokens:
            ratio = math.exp(logp[t] - old[t])
            if algorithm == "cispo":  # 2506.13585, eq. 4 and 5
                total += clip(ratio, 0.0, 5.0) * A * logp[t] / 10
                continue
            high = 1.28 if algorithm == "dapo" else 1.2
            gain = min(ratio * A, clip(ratio, 0.8, high) * A)
            k = math.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            divisor = {"grpo": 4 * len(tokens), "dapo": 10, "dr_grpo": 4 * LIMIT}[algorithm]
            total += (gain - s.kl * k) / divisor
    return -total


def loss_of(s, logp, old, ref, **more):
    logp, old, ref = (torch.as_tensor(x) for x in (logp, old, ref))
    weights = token_weights(torch.tensor(LENGTHS), s.average, LIMIT).double()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    return grpo_loss(logp, old, ref if s.kl else None, advantages, weights, torch.tensor(SEQUENCE), s, **more)


ALGORITHMS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_is_the_papers(algorithm, seed):
    s = section(algorithm)
    assert float(loss_of(s, *numbers(seed)).loss) == pytest.approx(
        by_hand(algorithm, *numbers(seed), s), rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_by_differences(algorithm):
    """CISPO's weight has no gradient, so it is held; GSPO's is that of the sequence's ratio."""
    s, (logp, old, ref) = section(algorithm, kl=0.1), numbers()
    if algorithm in ("gspo", "cispo"):
        s = section(algorithm)
    point = torch.tensor(logp, requires_grad=True)
    (found,) = torch.autograd.grad(loss_of(s, point, old, ref).loss, point)

    def value(x):
        if algorithm != "cispo":
            return by_hand(algorithm, x, old, ref, s)
        weights = [clip(math.exp(logp[t] - old[t]), 0.0, 5.0) for t in range(10)]
        return -sum(w * ADVANTAGES[SEQUENCE[t]] * x[t] for t, w in enumerate(weights)) / 10

    for t in range(10):
        step = np.zeros(10)
        step[t] = 1e-6
        assert found[t].item() == pytest.approx((value(logp + step) - value(logp - step)) / 2e-6, abs=1e-6), t


def test_gspo_clips_whole_outputs():
    s, (logp, old, ref) = section("gspo"), numbers()
    found = loss_of(s, logp, old, ref)
    ratio = np.exp([np.mean([logp[t] - old[t] for t in range(10) if SEQUENCE[t] == i]) for i in range(4)])
    low = sum(n for n, r, A in zip(LENGTHS, ratio, ADVANTAGES, strict=True) if r < 1 - 3e-4 and A < 0)
    high = sum(n for n, r, A in zip(LENGTHS, ratio, ADVANTAGES, strict=True) if r > 1 + 4e-4 and A > 0)
    assert (int(found.clipped_low), int(found.clipped_high)) == (low, high)
    assert low + high > 0
    assert float(found.ratio) == pytest.approx(np.dot(LENGTHS, ratio))
    assert float(found.largest_ratio) == pytest.approx(ratio.max())


def test_cispo_counts_weights_that_are_cut_whatever_the_advantage():
    logp, old = np.zeros(10), np.zeros(10)
    old[[2, 7]] = -2.0  # ratio 7.4, above 5
    found = loss_of(section("cispo"), logp, old, old)
    assert (int(found.clipped_low), int(found.clipped_high)) == (0, 2)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo"])
def test_gradient_passes_gradcheck_where_it_is_smooth(algorithm):
    """Ratios near 1, within every clip. CISPO and GSPO-token hold back gradients; see the differences above."""
    s, (logp, old, ref) = section(algorithm, kl=0.1), numbers()
    near = torch.tensor(old + 0.01 * (logp - old), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss_of(s, x, old, ref).loss, near)


def test_unbiased_kl_gradient_is_that_of_the_divergence():
    """Summed over all tokens as often as the sampler draws them: V3.2's estimate has the gradient of KL(π‖π_ref), also
    off-policy, and k3 has not.
    """
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref, sampler = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - ref)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)

    def gradient(kind):
        s = GRPOSection(kl=1.0, kl_estimate=kind)
        none, every = torch.zeros(7, dtype=torch.float64), torch.arange(7)
        found = grpo_loss(logits.log_softmax(0), sampler, ref, none, sampler.exp(), every, s)
        return torch.autograd.grad(found.loss, logits)[0]

    assert torch.allclose(gradient("unbiased"), wanted, atol=1e-10)
    assert not torch.allclose(gradient("k3"), wanted, atol=1e-2)


def test_the_unbiased_kl_is_weighted_by_the_policy_that_sampled():
    logp, old, ref = (torch.tensor(x) for x in numbers())
    sampled = old - 0.3
    s = GRPOSection(kl=0.5, kl_estimate="unbiased")
    weighted = float(loss_of(s, logp, old, ref, sampled_logprobs=sampled).kl)
    assert weighted == pytest.approx(float(((logp - sampled).exp() * kl_estimate(logp, ref)).sum()))
    assert weighted == pytest.approx(math.exp(0.3) * float(loss_of(s, logp, old, ref).kl))


def test_off_policy_masks_by_hand():
    logp, _, _ = numbers()
    sampled = logp + np.repeat([0.2, 0.2, 0.05, 0.11], LENGTHS)  # mean log(π_s/π)
    sampled[[2, 3]] += [0.4, -0.4]  # of the mean nothing changes
    logp, sampled = torch.tensor(logp), torch.tensor(sampled)
    found = off_policy_masked(logp, sampled, torch.tensor(ADVANTAGES), torch.tensor(SEQUENCE), 0.1)
    assert found.tolist() == [False, True, False, True]  # the first is good, the third near
    none = off_policy_masked(logp, sampled, torch.tensor(ADVANTAGES), torch.tensor(SEQUENCE), 0.25)
    assert not none.any()


def test_importance_weights_by_hand():
    old = torch.tensor([0.5, 0.2, 0.9, 0.3, 0.4, 0.1]).log()
    sampled = torch.tensor([0.1, 0.4, 0.3, 0.3, 0.5, 0.1]).log()  # token weights 5, 0.5, 3, 1, 0.8, 1
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])  # products 2.5, 3, 0.8
    expected = {
        "none": ([1, 1, 1, 1, 1, 1], 0),
        "token-truncate": ([2.9, 0.5, 2.9, 1, 0.8, 1], 2),
        "token-mask": ([0, 0.5, 0, 1, 0.8, 1], 2),
        "sequence-truncate": ([2.5, 2.5, 2.9, 2.9, 0.8, 0.8], 2),
        "sequence-mask": ([2.5, 2.5, 0, 0, 0.8, 0.8], 2),
    }
    for how, (wanted, cut) in expected.items():
        weights, which = importance_weights(old, sampled, sequence, how, 2.9)
        assert weights.tolist() == pytest.approx(wanted), how
        assert int(which.sum()) == cut
    assert importance_weights(old, sampled, sequence, "token-mask", 1.5)[0].tolist() == pytest.approx(
        [0, 0, 0, 1, 0.8, 1]
    )
    assert importance_weights(old, sampled, sequence, "sequence-mask", 1.1)[0].tolist() == pytest.approx(
        [0] * 4 + [0.8] * 2
    )


def test_weights_beyond_the_range_of_numbers_are_cut_too():
    old, sampled = torch.zeros(300), torch.full((300,), -5.0)
    for how, bound in (("sequence-truncate", 2.0), ("sequence-mask", 0.0)):
        weights, cut = importance_weights(old, sampled, torch.zeros(300, dtype=torch.long), how, 2.0)
        assert cut.all()
        assert (weights == bound).all()


def test_token_advantages_are_added():
    s, (logp, old, ref) = section("dr_grpo"), numbers()
    more = torch.linspace(-1, 1, 10, dtype=torch.float64)
    found = float(loss_of(s, logp, old, ref, token_advantages=more).loss)
    expected = 0.0
    for t in range(10):
        ratio, A = math.exp(logp[t] - old[t]), ADVANTAGES[SEQUENCE[t]] + float(more[t])
        expected -= min(ratio * A, clip(ratio, 0.8, 1.2) * A) / (4 * LIMIT)
    assert found == pytest.approx(expected, rel=1e-5)


def test_means_of_sequences():
    values, sequence = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    assert sequence_means(values, sequence, 4).tolist() == [2.0, 0.0, 5.0, 0.0]
