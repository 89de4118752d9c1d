"""The numbers and the sample that a step of reinforcement learning reports."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.rl.grpo import zero_std_groups
from rorqual.rl.rewards import Rewards, claims_right
from rorqual.rl.rollout import Rollout
from rorqual.train.balance import max_violation

Metrics = dict[str, float | str | list[float]]


@dataclass
class UpdateSums:
    """What the updates of one rollout gather over their micro-batches."""

    tokens: int = 0  # completion tokens
    computed: int = 0  # tokens in the rows, prompts and padding included
    entropy: float = 0.0
    kl: float | None = None  # None: no reference
    clipped: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)


def describe_rollout(rollout: Rollout, rewards: Rewards) -> Metrics:
    """reward and its parts (means), length (tokens), truncated, zero_std_groups and pass_at_g (shares), speed; and,
    where the model marks candidates, claimed (share of answers it calls right) and verdict_precision (how many are).

    pass_at_g is pass@G: groups with at least one right answer.
    """
    groups = (len(rollout.problems), -1)
    claims = torch.tensor([claims_right(s.text) for s in rollout.samples])
    metrics: Metrics = {"reward": float(rewards.total.mean())}
    metrics |= {f"reward_{name}": float(part.mean()) for name, part in rewards.parts.items()}
    metrics |= {
        "length": rollout.tokens / len(rollout.completions),
        "truncated": sum(s.truncated for s in rollout.samples) / len(rollout.samples),
        "zero_std_groups": float(zero_std_groups(rewards.total.view(groups)).float().mean()),
        "pass_at_g": float(rewards.correct.view(groups).any(1).float().mean()),
        "rollout_tokens_per_second": rollout.tokens / max(rollout.seconds, 1e-9),
    }
    if claims.any():
        metrics |= {
            "claimed": float(claims.float().mean()),
            "verdict_precision": float(rewards.correct[claims].float().mean()),
        }
    return metrics


def describe_update(sums: UpdateSums, seconds: float) -> Metrics:
    """grad_norm (mean over updates); means over tokens: entropy (nats), kl, clip_fraction; balance, speed."""
    if not sums.tokens:
        return {"grad_norm": 0.0}
    metrics: Metrics = {
        "grad_norm": sum(sums.grad_norms) / len(sums.grad_norms),
        "entropy": sums.entropy / sums.tokens,
        "clip_fraction": sums.clipped / sums.tokens,
        "train_tokens_per_second": sums.computed / max(seconds, 1e-9),
    }
    if sums.kl is not None:
        metrics["kl"] = sums.kl / sums.tokens
    if sums.loads:
        per_layer = [max_violation(load) for load in sums.loads]
        metrics |= {"max_vio": sum(per_layer) / len(per_layer), "max_vio_per_layer": per_layer}
    return metrics


def readable_sample(rollout: Rollout, rewards: Rewards, step: int) -> str:
    i = step % len(rollout.samples)
    sample = rollout.samples[i]
    return f"{sample.problem.question}\n{sample.text}\n[answer {sample.problem.answer}, reward {rewards.total[i]:.2f}]"
