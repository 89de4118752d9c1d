"""Group relative policy optimisation (GRPO) and its relatives: advantages and loss over tensors.

For each question, G outputs o_1 … o_G are sampled from π_old with rewards r_1 … r_G:

    A_i = (r_i − mean(r)) / std(r)                                                          R1 eq. 3
    ρ_t = π(o_t) / π_old(o_t)
    k_t = π_ref(o_t)/π(o_t) − log(π_ref(o_t)/π(o_t)) − 1                                     R1 eq. 2, ≥ 0
    ℓ_t = −min(ρ_t·A, clip(ρ_t, 1 − ε_low, 1 + ε_high)·A) + β·k_t                            R1 eq. 1
    L   = 1/S Σ_i 1/|o_i| Σ_t ℓ_t      ("sequence": every output has the same weight)
    L   = 1/Σ|o_i| Σ_i Σ_t ℓ_t         ("token": every token has the same weight; DAPO, 2503.14476, §3.3)
    L   = 1/(S·limit) Σ_i Σ_t ℓ_t      ("constant": no weight depends on lengths; Dr. GRPO, 2503.20783, §3.2)

ε_low ≠ ε_high is DAPO's clip-higher (§3.1); A without std is Dr. GRPO's (§3.2). Other ratios and surrogates:

    ρ_t = sg[(π(o)/π_old(o))^(1/|o|)] · π(o_t)/sg[π(o_t)]       "sequence": GSPO-token, 2507.18071, eq. 14
    ℓ_t = −sg[clip(ρ_t, 1 − ε_low, 1 + ε_high)]·A·log π(o_t)    "weighted": CISPO, MiniMax-M1, 2506.13585, eq. 4–5
    β·ρ_t·k_t instead of β·k_t                                  "unbiased": DeepSeek-V3.2, 2512.02556, §3.1

sg: no gradient. Where A is the same for all tokens of an output, GSPO-token with the average by sequence is GSPO.
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
    """`loss` is a scalar to differentiate; the others are of the N tokens and detached, sums but for the last."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped_low: Int[Tensor, ""]  # tokens whose ratio is cut at 1 − ε_low; "clipped": and so without policy gradient
    clipped_high: Int[Tensor, ""]  # at 1 + ε_high
    ratio: Float[Tensor, ""]
    largest_ratio: Float[Tensor, ""]


def group_advantages(
    rewards: Float[Tensor, "Q G"], normalise_std: bool, kept: Int[Tensor, " Q"] | None = None
) -> Float[Tensor, "Q G"]:
    """Advantages of the outputs, with the population's std; exactly 0 in zero-std groups.

    Without the exact 0, the rounding error of the mean, divided by a tiny std, would become a gradient. kept: outputs
    of each group that have a reward; the others have the mean of these (Rewards.grouped). None: all have.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(zero_std_groups(rewards)[:, None], 0.0)
    if not normalise_std:
        return centred
    deviation = rewards.std(dim=1, keepdim=True, correction=0)
    if kept is not None:
        deviation = deviation * (rewards.shape[1] / kept.clamp(min=1)).sqrt()[:, None]
    return centred / (deviation + EPSILON)


def zero_std_groups(rewards: Float[Tensor, "Q G"]) -> Bool[Tensor, " Q"]:
    """Whether all rewards of the group are equal up to rounding, so it has no policy gradient."""
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= ZERO_STD_TOLERANCE * rewards.abs().amax(dim=1)


def groups_with_spread(rewards: Float[Tensor, "Q G"], most: int) -> list[int]:
    """The first `most` groups whose rewards differ: what dynamic sampling trains on (DAPO, 2503.14476, §3.2)."""
    return [int(q) for q in (~zero_std_groups(rewards)).nonzero().flatten()[:most]]


def token_weights(
    lengths: Int[Tensor, " S"], average: Literal["sequence", "token", "constant"], limit: int
) -> Float[Tensor, " S"]:
    """The loss weight of each token of an output, from the lengths of the outputs of one update. limit: the most tokens
    of an output.
    """
    if average == "sequence":
        return 1.0 / (len(lengths) * lengths.float())
    if average == "constant":
        return torch.full_like(lengths, 1.0, dtype=torch.float32) / (len(lengths) * limit)
    return torch.full_like(lengths, 1.0, dtype=torch.float32) / lengths.sum()


def sequence_means(values: Float[Tensor, " N"], sequence: Int[Tensor, " N"], count: int) -> Float[Tensor, " S"]:
    """Means over the tokens of each of `count` outputs; 0 for those without tokens here."""
    return sequence_sums(values, sequence, count) / sequence.bincount(minlength=count).clamp(min=1)


def sequence_sums(values: Float[Tensor, " N"], sequence: Int[Tensor, " N"], count: int) -> Float[Tensor, " S"]:
    return values.new_zeros(count).index_add(0, sequence, values)


def grpo_loss(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"] | None,
    ref_logprobs: Float[Tensor, " N"] | None,
    advantages: Float[Tensor, " S"],
    weights: Float[Tensor, " S"],
    sequence: Int[Tensor, " N"],
    section: GRPOSection,
    importance: Float[Tensor, " N"] | None = None,
    sampled_logprobs: Float[Tensor, " N"] | None = None,
    token_advantages: Float[Tensor, " N"] | None = None,
) -> Loss:
    """The loss of N tokens, which may be a micro-batch of an update: the micro-batches' losses sum to L. A sequence's
    tokens must all be in one of them.

    logprobs, old_logprobs, ref_logprobs: of the sampled tokens under π, π_old, π_ref. old_logprobs None: on-policy,
    π_old = π; ref_logprobs None: no KL term. weights: from `token_weights` of the whole update; sequence: index of the
    output that the token belongs to. importance: weights of the tokens' policy gradients (mismatch.py).
    sampled_logprobs: under the policy that sampled, by which an unbiased KL estimate is weighted; None: π_old.
    token_advantages: added to the outputs' (distillation).
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    advantage, weight = advantages[sequence], weights[sequence]
    if token_advantages is not None:
        advantage = advantage + token_advantages
    log_ratio = logprobs - old
    if section.ratio == "sequence":
        mean = sequence_means(log_ratio.detach(), sequence, len(advantages))[sequence]
        log_ratio = mean + (logprobs - logprobs.detach())
    ratio = log_ratio.exp()
    low, high = ratio < 1 - section.clip_low, ratio > 1 + section.clip_high
    bounded = ratio.clamp(1 - section.clip_low, 1 + section.clip_high)
    if section.surrogate == "weighted":
        gain = bounded.detach() * advantage * logprobs
    else:
        gain = torch.minimum(ratio * advantage, bounded * advantage)
        low, high = low & (advantage < 0), high & (advantage > 0)
    if importance is not None:
        gain = gain * importance
    loss, kl = -gain, torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs)
        if section.kl_estimate == "unbiased":
            kl = kl * (logprobs - (old if sampled_logprobs is None else sampled_logprobs)).exp()
        loss = loss + section.kl * kl
    ratio = ratio.detach()
    return Loss((loss * weight).sum(), kl.detach().sum(), low.sum(), high.sum(), ratio.sum(), ratio.max())


def off_policy_masked(
    logprobs: Float[Tensor, " N"],
    sampled_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " S"],
    sequence: Int[Tensor, " N"],
    delta: float,
) -> Bool[Tensor, " S"]:
    """Outputs that teach nothing: bad ones that π would hardly sample any more, A < 0 and mean log(π_s/π) > δ.

    DeepSeek-V3.2 (2512.02556, §3.1): such outputs mislead, since π learns from its own mistakes only. π_s: the
    policy that sampled.
    """
    drift = sequence_means(sampled_logprobs - logprobs.detach(), sequence, len(advantages))
    return (advantages < 0) & (drift > delta)


def on_policy_grad(
    advantages: Float[Tensor, " S"], weights: Float[Tensor, " S"], sequence: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """dL/d log π of each token when π_old = π and there is no KL term: ρ = 1 and nothing is clipped, whichever the
    ratio and the surrogate.
    """
    return -(advantages * weights)[sequence]


def kl_estimate(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """k3 estimator: π_ref/π − log(π_ref/π) − 1, unbiased for KL(π‖π_ref) on samples of π and ≥ 0 (R1 eq. 2)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1
