"""Rollouts from other numbers than those that are trained: what differs, and how the loss is corrected.

With rollouts or updates in fewer bits, or rollouts from weights of an earlier step, tokens are sampled from π_s,
another policy than π under which they are trained. Every token's policy gradient is weighted by importance sampling,
and the weights are bounded by C so that a token that π_s found improbable cannot dominate. w = π_old(o_t)/π_s(o_t):

    token-truncate     min(w, C)                          Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
                                                          You Off-Policy RL Training"
    token-mask         w where 1/C ≤ w ≤ C, else 0        IcePop: Ling team 2025, "Small Leak Can Sink a Great Ship"
    sequence-truncate  min(Π w, C), of an output's tokens Liu et al. 2025, "When Speed Kills Stability": unbiased but
    sequence-mask      Π w where Π w ≤ C, else 0          for the bound, where token weights keep a bias in the states

N tokens, S outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.router_hooks import choices_of
from rorqual.rl.grpo import kl_estimate, sequence_sums
from rorqual.rl.rollout_packing import PackedRollout
from rorqual.shapes import Bool, Float, Int

CAP = 2.0  # C, where a recipe does not give it
Correction = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


def importance_weights(
    old: Float[Tensor, " N"], sampled: Float[Tensor, " N"], sequence: Int[Tensor, " N"], how: Correction, cap: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The weights from log-probabilities under π_old and π_s, and which of them are cut at C or masked.

    sequence: index of the output that the token belongs to; all of an output's tokens are among the N.
    """
    log_weight = old - sampled
    if how == "none":
        return torch.ones_like(log_weight), torch.zeros_like(log_weight, dtype=torch.bool)
    if how.startswith("sequence"):
        log_weight = sequence_sums(log_weight, sequence, int(sequence.max()) + 1)[sequence]
    weight = log_weight.exp()
    if how.endswith("truncate"):
        return weight.clamp(max=cap), weight > cap
    outside = weight > cap if how == "sequence-mask" else (weight > cap) | (weight < 1 / cap)
    return weight.masked_fill(outside, 0.0), outside


@dataclass
class Mismatch:
    """Sums over the tokens of one rollout's updates."""

    cap: float
    correction: Correction = "token-truncate"
    difference: float = 0.0  # |log π_old − log π_s|
    kl: float = 0.0  # estimates of KL(π_s‖π_old)
    truncated: int = 0  # tokens whose weight is cut at C or masked
    routers_differ: float | None = None  # fraction of tokens and layers; None: no routers, or not measured

    def weights(
        self, old: Float[Tensor, " N"], sampled: Float[Tensor, " N"], sequence: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """See `importance_weights`; adds to the sums."""
        weights, cut = importance_weights(old, sampled, sequence, self.correction, self.cap)
        self.difference += float((old - sampled).abs().sum())
        self.kl += float(kl_estimate(sampled, old).sum())
        self.truncated += int(cut.sum())
        return weights


@dataclass
class Comparison:
    """Log-probabilities as sampled against those of the trainer before it updates, token by token."""

    tokens: int = 0
    differing: int = 0  # in any bit
    largest: float = 0.0  # |difference|

    def add(self, trained: Float[Tensor, " N"], sampled: Float[Tensor, " N"]) -> None:
        trained = trained.float()
        apart = (trained - sampled).abs()
        self.tokens += len(apart)
        self.differing += int((trained.view(torch.int32) != sampled.view(torch.int32)).sum())
        self.largest = max(self.largest, float(apart.max())) if len(apart) else self.largest


@torch.no_grad()
def routers_differ(sampler: Transformer, packed: PackedRollout, trained: list[Tensor]) -> float | None:
    """The fraction of (predicting token, layer) for which the sampling model's router chooses another set of experts
    than `trained`, which `choices_of` gathered from the trained model on the same micro-batch.
    """
    with choices_of(sampler) as sampled:
        sampler(packed.tokens, packed.positions, packed.mask)
    if not trained:
        return None
    shares = [
        (a.sort(-1).values != b.sort(-1).values).any(-1)[packed.source].float().mean()
        for a, b in zip(sampled, trained, strict=True)
    ]
    return float(torch.stack(shares).mean())
