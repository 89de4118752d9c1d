"""Group relative policy optimisation (GRPO): advantages and loss over tensors (R1 §2.1; DeepSeekMath 2402.03300 §4.1).

For each question, G outputs o_1 … o_G are sampled from π_old with rewards r_1 … r_G:

    A_i = (r_i − mean(r)) / std(r)                                                          R1 eq. 3
    ρ_t = π(o_t) / π_old(o_t)
    k_t = π_ref(o_t)/π(o_t) − log(π_ref(o_t)/π(o_t)) − 1                                     R1 eq. 2, ≥ 0
    ℓ_t = −min(ρ_t·A, clip(ρ_t, 1 − ε_low, 1 + ε_high)·A) + β·k_t                            R1 eq. 1
    L   = 1/S Σ_i 1/|o_i| Σ_t ℓ_t      ("sequence": every output has the same weight)
    L   = 1/Σ|o_i| Σ_i Σ_t ℓ_t         ("token": every token has the same weight; DAPO, 2503.14476, §3.3)

ε_low ≠ ε_high is DAPO's clip-higher (§3.1); A without std is Dr. GRPO's (2503.20783, §3.2).
Shapes: Q questions, G outputs of a question, S outputs (sequences), N tokens of all outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rorqual.recipe import GRPOSection
from rorqual.shapes import Bool, Float, Int

EPSILON = 1e-6
ZERO_STD_TOLERANCE = 1e-6  # relative spread of a group's rewards below which it is rounding only


@dataclass(frozen=True)
class Loss:
    """`loss` is a scalar to differentiate; `kl` and `clipped` are sums over the N tokens, detached."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped: Int[Tensor, ""]  # tokens with zero policy gradient because of the clip


def group_advantages(rewards: Float[Tensor, "Q G"], normalise_std: bool) -> Float[Tensor, "Q G"]:
    """Advantages of the outputs, with the population's std; exactly 0 in zero-std groups.

    Without the exact 0, the rounding error of the mean, divided by a tiny std, would become a gradient.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(zero_std_groups(rewards)[:, None], 0.0)
    if not normalise_std:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True, correction=0) + EPSILON)


def zero_std_groups(rewards: Float[Tensor, "Q G"]) -> Bool[Tensor, " Q"]:
    """Whether all rewards of the group are equal up to rounding, so it has no policy gradient."""
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= ZERO_STD_TOLERANCE * rewards.abs().amax(dim=1)


def token_weights(lengths: Int[Tensor, " S"], average: Literal["sequence", "token"]) -> Float[Tensor, " S"]:
    """The loss weight of each token of an output, from the lengths of the outputs of one update."""
    if average == "sequence":
        return 1.0 / (len(lengths) * lengths.float())
    return torch.full_like(lengths, 1.0, dtype=torch.float32) / lengths.sum()


def grpo_loss(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"] | None,
    ref_logprobs: Float[Tensor, " N"] | None,
    advantages: Float[Tensor, " S"],
    weights: Float[Tensor, " S"],
    sequence: Int[Tensor, " N"],
    section: GRPOSection,
    importance: Float[Tensor, " N"] | None = None,
) -> Loss:
    """The loss of N tokens, which may be a micro-batch of an update: the micro-batches' losses sum to L.

    logprobs, old_logprobs, ref_logprobs: of the sampled tokens under π, π_old, π_ref. old_logprobs None: on-policy,
    π_old = π; ref_logprobs None: no KL term. weights: from `token_weights` of the whole update; sequence: index of the
    output that the token belongs to. importance: weights of the tokens' policy gradients (mismatch.py).
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    advantage, weight = advantages[sequence], weights[sequence]
    ratio = (logprobs - old).exp()
    bounded = ratio.clamp(1 - section.clip_low, 1 + section.clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (bounded * advantage < ratio * advantage).sum()
    if importance is not None:
        gain = gain * importance
    loss, kl = -gain, torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs)
        loss = loss + section.kl * kl
    return Loss((loss * weight).sum(), kl.detach().sum(), clipped)


def on_policy_grad(
    advantages: Float[Tensor, " S"], weights: Float[Tensor, " S"], sequence: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """dL/d log π of each token when π_old = π and there is no KL term: ρ = 1 and nothing is clipped."""
    return -(advantages * weights)[sequence]


def kl_estimate(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """k3 estimator: π_ref/π − log(π_ref/π) − 1, unbiased for KL(π‖π_ref) on samples of π and ≥ 0 (R1 eq. 2)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1
