"""Metrics and the sample text that one RL step logs."""

import math
import statistics
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rorqual.model.router_hooks import Replay
from rorqual.rl.grpo import zero_std_groups
from rorqual.rl.mismatch import Mismatch
from rorqual.rl.rewards import Rewards, self_verified
from rorqual.rl.rollout import Rollout
from rorqual.train.balance import max_violations
from rorqual.train.telemetry import Metric, mean

TIMES = ("rollout_seconds", "reward_seconds", "update_seconds")


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
    mismatch: Mismatch | None = None  # None: rollouts are from the numbers that are trained
    replay: Replay = field(default_factory=Replay)  # of recorded routing, if any


@dataclass(frozen=True)
class RolloutMetrics:
    """Of one rollout. The last two only where the model verifies itself (✓, ✗)."""

    reward: float  # mean, as the parts
    reward_parts: dict[str, float]
    length: float  # mean tokens of a completion
    length_spread: float  # standard deviation of the logarithm of a completion's tokens
    truncated: float  # fraction of the completions
    zero_std_groups: float  # fraction of the groups
    pass_at_g: float  # pass@G: fraction of the groups with at least one correct completion
    rollout_tokens_per_second: float
    claimed: float | None  # fraction of the completions that end on ✓
    verdict_precision: float | None  # fraction of those that are correct
    turns: float | None = None  # of the model, mean of an episode; None: single ones

    def to_dict(self) -> dict[str, Metric]:
        """The metrics of a line of metrics.jsonl, with `reward_<part>`."""
        rest = asdict(self)
        parts = {f"reward_{name}": part for name, part in rest.pop("reward_parts").items()}
        return {"reward": rest.pop("reward")} | parts | rest


@dataclass(frozen=True)
class UpdateMetrics:
    """Of the updates on one rollout. Only `grad_norm` where all groups were dropped."""

    grad_norm: float = 0.0  # mean over the updates, before clipping
    entropy: float | None = None  # nats, mean over the tokens, as the next
    clip_fraction: float | None = None
    train_tokens_per_second: float | None = None
    kl: float | None = None  # None also without a reference model
    max_vio_per_layer: list[float] | None = None  # MaxVio of each MoE layer
    # Where rollouts or updates round or rollouts are stale (mismatch.py): mean over the tokens of |log π_old − log π_s|
    # and of the estimate of KL(π_s‖π_old), fraction of the tokens with a truncated weight, and of those whose routers
    # chose otherwise (with a replay: would have chosen).
    mismatch_logprob: float | None = None
    mismatch_kl: float | None = None
    importance_truncated: float | None = None
    routers_differ: float | None = None

    def to_dict(self) -> dict[str, Metric]:
        """The metrics of a line of metrics.jsonl."""
        rest = asdict(self)
        per_layer = rest.pop("max_vio_per_layer")
        return rest | {"max_vio": mean(per_layer), "max_vio_per_layer": per_layer}


@dataclass(frozen=True)
class RLMetrics:
    """Of one RL step."""

    tokens: int  # sampled so far
    lr: float
    rollout: RolloutMetrics
    update: UpdateMetrics
    sample: str | None  # a completion to read, every `sample_every` steps
    rollout_seconds: float  # that sampling took
    reward_seconds: float
    update_seconds: float
    wait_seconds: float  # in which the trainer did nothing else; the same without a fleet
    skipped: bool  # the last update had no finite gradient
    notes: list[str] = field(default_factory=list[str])  # what happened to rollout workers, and samples skipped
    staleness: int | None = None  # steps by which the rollout's weights are older; of a fleet, as the next
    pushed_bytes: int | None = None  # of weights, this step

    def to_dict(self) -> dict[str, Metric]:
        """The metrics of a line of metrics.jsonl."""
        head: dict[str, Metric] = {"tokens": self.tokens, "lr": self.lr}
        update = self.update.to_dict() | ({"grad_norm": None} if self.skipped else {})
        fleet: dict[str, Metric] = {"staleness": self.staleness, "pushed_bytes": self.pushed_bytes}
        if self.staleness is not None:
            fleet["rollout_wait_seconds"] = self.wait_seconds
        times: dict[str, Metric] = {name: getattr(self, name) for name in TIMES}
        return head | times | self.rollout.to_dict() | fleet | update | {"sample": self.sample}


def describe_rollout(rollout: Rollout, rewards: Rewards) -> RolloutMetrics:
    groups = (len(rollout.problems), -1)
    claims = torch.tensor([self_verified(s.text) for s in rollout.samples])
    claimed = bool(claims.any())
    turns = [sum(message["role"] == "assistant" for message in s.turns) for s in rollout.samples]
    return RolloutMetrics(
        reward=rewards.mean(rewards.total),
        reward_parts={name: rewards.mean(part) for name, part in rewards.parts.items()},
        length=rollout.tokens / len(rollout.completions),
        length_spread=statistics.pstdev(map(math.log, rollout.lengths)),
        truncated=sum(s.truncated for s in rollout.samples) / len(rollout.samples),
        zero_std_groups=float(zero_std_groups(rewards.grouped(len(rewards.total) // groups[0])).float().mean()),
        pass_at_g=float(rewards.correct.view(groups).any(1).float().mean()),
        rollout_tokens_per_second=rollout.tokens / max(rollout.seconds, 1e-9),
        claimed=float(claims.float().mean()) if claimed else None,
        verdict_precision=float(rewards.correct[claims].float().mean()) if claimed else None,
        turns=sum(turns) / len(turns) if any(turns) else None,
    )


def describe_update(sums: UpdateSums, seconds: float) -> UpdateMetrics:
    if not sums.tokens:
        return UpdateMetrics()
    mismatch, tokens, replay = sums.mismatch, sums.tokens, sums.replay
    return UpdateMetrics(
        grad_norm=sum(sums.grad_norms) / len(sums.grad_norms),
        entropy=sums.entropy / sums.tokens,
        clip_fraction=sums.clipped / sums.tokens,
        train_tokens_per_second=sums.computed / max(seconds, 1e-9),
        kl=None if sums.kl is None else sums.kl / sums.tokens,
        max_vio_per_layer=max_violations(sums.loads) if sums.loads else None,
        mismatch_logprob=mismatch and mismatch.difference / tokens,
        mismatch_kl=mismatch and mismatch.kl / tokens,
        importance_truncated=mismatch and mismatch.truncated / tokens,
        routers_differ=replay.differ / replay.replayed if replay.replayed else mismatch and mismatch.routers_differ,
    )


def readable_sample(rollout: Rollout, rewards: Rewards, step: int) -> str:
    """Question, completion, reference answer and reward of one completion of the rollout."""
    i = step % len(rollout.samples)
    sample = rollout.samples[i]
    said = "\n".join(message["content"] or "" for message in sample.turns) or sample.text
    return f"{sample.problem.question}\n{said}\n[answer {sample.problem.answer}, reward {rewards.total[i]:.2f}]"
