"""Metrics and the sample text that one RL step logs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.rl.grpo import zero_std_groups
from rorqual.rl.rewards import Rewards, self_verified
from rorqual.rl.rollout import Rollout
from rorqual.train.balance import max_violation

Metrics = dict[str, float | str | list[float]]


@dataclass
class UpdateSums:
    """Sums over the micro-batches of one rollout's updates."""

    tokens: int = 0  # completion tokens
    computed: int = 0  # tokens in the forward pass, prompts and padding included
    entropy: float = 0.0
    kl: float | None = None  # None: no reference
    clipped: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)


def describe_rollout(rollout: Rollout, rewards: Rewards) -> Metrics:
    """Metrics of the rollout.

    reward and reward_<part> (means); length (mean tokens); truncated, zero_std_groups and pass_at_g (pass@G: groups
    with at least one correct completion), all fractions; rollout_tokens_per_second. Where the model verifies itself (✓,
    ✗): claimed (fraction of completions that end on ✓) and verdict_precision (fraction of those that are correct).
    """
    groups = (len(rollout.problems), -1)
    claims = torch.tensor([self_verified(s.text) for s in rollout.samples])
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
    """grad_norm (mean over updates), token means of entropy (nats), kl and clip_fraction; tokens/s; load balance."""
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
    """Question, completion, reference answer and reward of one completion of the rollout."""
    i = step % len(rollout.samples)
    sample = rollout.samples[i]
    return f"{sample.problem.question}\n{sample.text}\n[answer {sample.problem.answer}, reward {rewards.total[i]:.2f}]"
