"""Rollouts from other numbers than those that are trained: what differs, and how the loss is corrected.

With rollouts or updates in FP8, or rollouts from weights of an earlier step, tokens are sampled from π_s, another
policy than π under which they are trained. Every token's policy gradient is weighted by min(π_old(o_t)/π_s(o_t), C):
importance sampling, truncated so that a token that π_s found improbable cannot dominate (Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"). N tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.router_hooks import choices_of
from rorqual.rl.grpo import kl_estimate
from rorqual.rl.rollout_packing import PackedRollout
from rorqual.shapes import Float

CAP = 2.0  # C, where a recipe does not give it


@dataclass
class Mismatch:
    """Sums over the tokens of one rollout's updates."""

    cap: float
    difference: float = 0.0  # |log π_old − log π_s|
    kl: float = 0.0  # estimates of KL(π_s‖π_old)
    truncated: int = 0  # tokens whose weight is C
    routers_differ: float | None = None  # fraction of tokens and layers; None: no routers, or not measured

    def weights(self, old: Float[Tensor, " N"], sampled: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Truncated importance weights from log-probabilities under π_old and π_s; adds to the sums."""
        ratio = (old - sampled).exp()
        self.difference += float((old - sampled).abs().sum())
        self.kl += float(kl_estimate(sampled, old).sum())
        self.truncated += int((ratio > self.cap).sum())
        return ratio.clamp(max=self.cap)


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
