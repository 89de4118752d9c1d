import copy
import math

import pytest
import torch

from rorqual.model.router_hooks import choices_of
from rorqual.recipe import GRPOSection
from rorqual.rl.grpo import grpo_loss
from rorqual.rl.mismatch import Mismatch, routers_differ
from rorqual.rl.rollout_packing import pack_rollout


def test_weights_by_hand():
    mismatch = Mismatch(cap=2.0)
    old, sampled = torch.tensor([0.5, 0.1, 0.3]).log(), torch.tensor([0.1, 0.2, 0.3]).log()
    assert mismatch.weights(old, sampled, torch.tensor([0, 0, 1])).tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert mismatch.truncated == 1
    assert mismatch.difference == pytest.approx(math.log(5) + math.log(2))
    assert mismatch.kl == pytest.approx((5 - math.log(5) - 1) + (0.5 - math.log(0.5) - 1), rel=1e-5)


def test_importance_weights_the_policy_gradient_and_not_the_kl_term():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    reference, sequence = torch.tensor([-1.5, -1.5, -3.5]), torch.tensor([0, 1, 1])
    advantages, weights, section = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25]), GRPOSection(kl=0.1)

    def gradient(kl, importance=None):
        section = GRPOSection(kl=kl)
        ref = reference if kl else None
        found = grpo_loss(logprobs, None, ref, advantages, weights, sequence, section, importance)
        return torch.autograd.grad(found.loss, logprobs)[0]

    importance = torch.tensor([2.0, 0.5, 1.0])
    kl_part = gradient(section.kl) - gradient(0.0)
    expected = gradient(0.0) * importance + kl_part
    assert gradient(section.kl, importance).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_importance_weights_recover_the_gradient_of_the_trained_policy():
    """Sampled from another distribution and weighted, the expected policy gradient is that of on-policy samples."""
    logits = torch.tensor([0.3, -0.2, 0.1, 0.5], requires_grad=True)
    sampler, reward = torch.tensor([0.4, 0.1, 0.3, 0.2]), torch.tensor([1.0, -1.0, 0.5, 0.0])
    every = torch.arange(4)

    def expected(probability, importance):
        logprobs = logits.log_softmax(0)
        loss = grpo_loss(logprobs, None, None, reward, probability, every, GRPOSection(), importance).loss
        return torch.autograd.grad(loss, logits)[0]

    on_policy = logits.softmax(0).detach()
    weights = Mismatch(cap=1e9).weights(on_policy.log(), sampler.log(), every)
    assert torch.allclose(expected(sampler, weights), expected(on_policy, None), atol=1e-6)
    assert not torch.allclose(expected(sampler, None), expected(on_policy, None), atol=1e-2)


def test_routers_differ_counts_sets_of_experts(moe):
    (packed,) = pack_rollout([[1, 2, 3]], [[4, 5, 6], [7, 8]], [0, 0], 64, lambda _: 1.0)
    other = copy.deepcopy(moe).eval()
    with torch.no_grad(), choices_of(moe.eval()) as trained:
        moe(packed.tokens, packed.positions, packed.mask)
    assert len(trained) == sum(1 for _ in moe.moe_layers()[: len(trained)]) > 0
    assert routers_differ(other, packed, trained) == 0.0
    with torch.no_grad():
        other.moe_layers()[len(trained) - 1].gate.weight.neg_()
    share = routers_differ(other, packed, trained)
    assert 0 < share <= 1 / len(trained)
    assert not any(layer.gate._forward_hooks for layer in moe.moe_layers())
