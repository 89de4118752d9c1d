import math

import pytest
import torch

from rorqual.recipe import GRPOSection
from rorqual.rl.grpo import group_advantages, grpo_loss, kl_estimate, on_policy_grad, token_weights, zero_std_groups

SECTION = GRPOSection(clip_low=0.2, clip_high=0.3, kl=0.1)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [4.0, 0.0, 0.0, 0.0]])
    plain = group_advantages(rewards, normalise_std=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [3, -1, -1, -1]]
    scaled = group_advantages(rewards, normalise_std=True)
    assert scaled[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert scaled[1].tolist() == [0, 0, 0, 0]
    assert scaled[2].tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], abs=1e-4)
    assert zero_std_groups(rewards).tolist() == [False, True, False]


def test_weights_by_hand():
    lengths = torch.tensor([1, 4])
    assert token_weights(lengths, "sequence", 8).tolist() == [0.5, 0.125]
    assert token_weights(lengths, "token", 8).tolist() == pytest.approx([0.2, 0.2])
    assert token_weights(lengths, "constant", 8).tolist() == [1 / 16, 1 / 16]


def loss_of(logprobs, old, ref, advantages, average="sequence", section=SECTION):
    """Two outputs of one and two tokens."""
    sequence = torch.tensor([0, 1, 1])
    weights = token_weights(torch.tensor([1, 2]), average, 4)
    return grpo_loss(logprobs, old, ref, torch.tensor(advantages), weights, sequence, section)


def test_loss_by_hand():
    ratio = torch.tensor([1.5, 0.5, 1.1])
    old = torch.tensor([-1.0, -2.0, -0.5])
    logprobs = (old + ratio.log()).requires_grad_()
    # Output 0 (A = 2): ρ 1.5 is cut at 1.3. Output 1 (A = −1): ρ 0.5 is cut at 0.8, ρ 1.1 stays.
    for average, weights in (("sequence", (1 / 2, 1 / 4, 1 / 4)), ("token", (1 / 3, 1 / 3, 1 / 3))):
        found = loss_of(logprobs, old, None, [2.0, -1.0], average)
        gains = (1.3 * 2.0, 0.8 * -1.0, 1.1 * -1.0)
        assert found.loss.item() == pytest.approx(-sum(w * g for w, g in zip(weights, gains, strict=True)), rel=1e-5)
        assert (int(found.clipped_low), int(found.clipped_high)) == (1, 1)
        assert float(found.ratio) == pytest.approx(3.1, rel=1e-5)
        assert float(found.largest_ratio) == pytest.approx(1.5, rel=1e-5)
        (gradient,) = torch.autograd.grad(found.loss, logprobs)
        assert gradient.tolist() == pytest.approx([0, 0, weights[2] * 1.1], rel=1e-5)


def test_the_clip_leaves_what_brings_the_ratio_back():
    old = torch.zeros(3)
    logprobs = torch.tensor([math.log(0.5), math.log(1.5), 0.0], requires_grad=True)
    found = loss_of(logprobs, old, None, [2.0, -1.0])  # good token grown unlikely, bad token grown likely
    assert int(found.clipped_low) == int(found.clipped_high) == 0
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient.tolist() == pytest.approx([-0.5 * 2 * 0.5, 0.25 * 1.5, 0.25], rel=1e-5)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    found = loss_of(logprobs, None, None, [2.0, -1.0])
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient.tolist() == pytest.approx([-2 / 2, 1 / 4, 1 / 4])
    assert found.loss.item() == pytest.approx(-(2.0 - 1.0) / 2)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_the_slope_is_known_before_the_loss(average):
    lengths, sequence = torch.tensor([1, 3, 2]), torch.tensor([0, 1, 1, 1, 2, 2])
    advantages, weights = torch.tensor([2.0, -1.0, 0.0]), token_weights(lengths, average, 4)
    logprobs = -torch.rand(6).requires_grad_()
    loss = grpo_loss(logprobs, None, None, advantages, weights, sequence, SECTION).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, on_policy_grad(advantages, weights, sequence))


def test_kl_by_hand():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ref = torch.tensor([-1.0, -1.5, -4.0])
    expected = [0.0, math.exp(0.5) - 0.5 - 1, math.exp(-1) + 1 - 1]
    assert kl_estimate(logprobs, ref).tolist() == pytest.approx(expected, rel=1e-5)
    found = loss_of(logprobs, None, ref, [0.0, 0.0])
    assert float(found.kl) == pytest.approx(sum(expected), rel=1e-5)
    assert found.loss.item() == pytest.approx(0.1 * (expected[1] + expected[2]) / 4, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    slopes = [0.0, 1 - math.exp(0.5), 1 - math.exp(-1)]  # d/dlog π of the estimator
    assert gradient.tolist() == pytest.approx([0.1 * s / (2 if i == 0 else 4) for i, s in enumerate(slopes)], abs=1e-6)


def test_kl_estimate_is_unbiased():
    torch.manual_seed(0)
    p, q = torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0)
    expected = (p.exp() * kl_estimate(p, q)).sum()
    assert expected.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_parts_add_up_to_the_whole():
    torch.manual_seed(1)
    logprobs, old, ref = -torch.rand(9), -torch.rand(9), -torch.rand(9)
    sequence = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    weights, advantages = token_weights(torch.tensor([2, 4, 3]), "sequence", 4), torch.tensor([1.0, -0.5, 0.3])
    whole = grpo_loss(logprobs, old, ref, advantages, weights, sequence, SECTION).loss
    cuts = (slice(0, 4), slice(4, 9))
    parts = [grpo_loss(logprobs[c], old[c], ref[c], advantages, weights, sequence[c], SECTION).loss for c in cuts]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("reward", [0.05, 0.1, 0.3, 0.7, 1.1, 2.2, -0.3, 0.0, 1e-30, 1e6])
def test_equal_rewards_have_advantages_of_exactly_0(reward, normalise_std):
    for size in range(2, 65):
        rewards = torch.full((3, size), reward)
        assert group_advantages(rewards, normalise_std).abs().max() == 0, size
        assert zero_std_groups(rewards).all()


def test_rewards_that_differ_by_rounding_are_equal():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3001]])
    rewards[0, 0] = torch.nextafter(rewards[0, 1], torch.tensor(1.0))
    assert zero_std_groups(rewards).tolist() == [True, False]
    advantages = group_advantages(rewards, normalise_std=True)
    assert advantages[0].tolist() == [0, 0, 0, 0]
    assert advantages[1, 3] > 1


def test_a_sample_without_a_reward_leaves_the_others_advantages():
    """Of rewards 1, 2 and 6, and one that has none and so their mean: as if there were three."""
    rewards = torch.tensor([[1.0, 2.0, 6.0, 3.0]])
    found = group_advantages(rewards, normalise_std=True, kept=torch.tensor([3]))
    three = group_advantages(rewards[:, :3], normalise_std=True)
    assert torch.allclose(found[:, :3], three)
    assert three[0, 0] == pytest.approx(-2 / math.sqrt(14 / 3), rel=1e-5)
