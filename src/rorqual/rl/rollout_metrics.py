"""Metrics and the sample text that one RL step logs."""

import math
import statistics
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rorqual.model.router_hooks import Replay
from rorqual.rl.grpo import Loss, zero_std_groups
from rorqual.rl.mismatch import Comparison, Mismatch
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
    distilled: float | None = None  # reverse KL to the teachers; None: there are none
    taught: dict[str, int] = field(default_factory=dict[str, int])  # tokens that each has read, by its path
    clipped_low: int = 0  # tokens, as the next two
    clipped_high: int = 0
    masked: int | None = None  # off-policy; None: not masked
    ratio: float = 0.0
    largest_ratio: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    mtp_loss: float | None = None  # nats a token, of the multi-token modules; None: not trained
    mismatch: Mismatch | None = None  # None: rollouts are from the numbers that are trained
    comparison: Comparison = field(default_factory=Comparison)  # of the first update, whose policy is the sampled one
    replay: Replay = field(default_factory=Replay)  # of recorded routing, if any

    def add(self, loss: Loss, tokens: int, computed: int, entropy: float, has_reference: bool) -> None:
        """A micro-batch's."""
        self.tokens += tokens
        self.computed += computed
        self.entropy += entropy
        if has_reference:
            self.kl = (self.kl or 0.0) + float(loss.kl)
        self.clipped_low += int(loss.clipped_low)
        self.clipped_high += int(loss.clipped_high)
        self.ratio += float(loss.ratio)
        self.largest_ratio = max(self.largest_ratio, float(loss.largest_ratio))

    def add_taught(self, teacher: str, computed: int, divergence: Tensor) -> None:
        """A micro-batch's reverse KL to its teacher, by token."""
        self.distilled = (self.distilled or 0.0) + float(divergence.sum())
        self.taught[teacher] = self.taught.get(teacher, 0) + computed


@dataclass(frozen=True)
class RolloutMetrics:
    """Of one rollout. The last two only where the model verifies itself (✓, ✗)."""

    reward: float  # mean, as the parts
    reward_parts: dict[str, float | None]  # None: no sample has it
    length: float  # mean tokens of a completion
    length_spread: float  # standard deviation of the logarithm of a completion's tokens
    truncated: float  # fraction of the completions
    zero_std_groups: float  # fraction of the groups
    # pass@G: fraction of the groups with at least one correct completion; None: all problems are open
    pass_at_g: float | None
    rollout_tokens_per_second: float
    draws: int  # rollouts that it is made of (grpo.max_draws)
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
    clip_fraction: float | None = None  # of the tokens, at either bound; then at the lower and the upper one
    clip_fraction_low: float | None = None
    clip_fraction_high: float | None = None
    ratio_mean: float | None = None  # π/π_old
    ratio_max: float | None = None
    train_tokens_per_second: float | None = None
    kl: float | None = None  # None also without a reference model
    opd_kl: float | None = None  # estimate of KL(π‖π_T), or with loss = "full" itself; None also without a teacher
    off_policy_masked: float | None = None  # fraction of the tokens (grpo.off_policy_mask); None also without it
    max_vio_per_layer: list[float] | None = None  # MaxVio of each MoE layer
    # Of the tokens of the first update: fraction whose log-probability as sampled differs in any bit from the trainer's
    # before it, and the largest |difference|.
    mismatch_share: float | None = None
    mismatch_max: float | None = None
    # Where rollouts or updates round or rollouts are stale (mismatch.py): mean over the tokens of |log π_old − log π_s|
    # and of the estimate of KL(π_s‖π_old), fraction of the tokens whose weight was cut or masked, and of those whose
    # routers chose otherwise (with a replay: would have chosen).
    mismatch_logprob: float | None = None
    mismatch_kl: float | None = None
    importance_truncated: float | None = None
    routers_differ: float | None = None
    mtp_loss: float | None = None  # nats a token, where the multi-token module is trained (mtp_update.py)

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


def describe_rollout(rollout: Rollout, rewards: Rewards, draws: int = 1) -> RolloutMetrics:
    groups = (len(rollout.problems), -1)
    ruled = rewards.ruled
    solved = rewards.correct.view(groups).any(1)[ruled.view(groups).all(1)]
    claims = torch.tensor([self_verified(s.text) for s in rollout.samples]) & ruled
    claimed = bool(claims.any())
    turns = [sum(message["role"] == "assistant" for message in s.turns) for s in rollout.samples]
    return RolloutMetrics(
        reward=rewards.mean(rewards.total),
        reward_parts={name: rewards.mean(part) if any(~part.isnan()) else None for name, part in rewards.parts.items()},
        length=rollout.tokens / len(rollout.completions),
        length_spread=statistics.pstdev(map(math.log, rollout.lengths)),
        truncated=sum(s.truncated for s in rollout.samples) / len(rollout.samples),
        zero_std_groups=float(zero_std_groups(rewards.grouped(len(rewards.total) // groups[0])).float().mean()),
        pass_at_g=float(solved.float().mean()) if len(solved) else None,
        rollout_tokens_per_second=rollout.tokens / max(rollout.seconds, 1e-9),
        draws=draws,
        claimed=float(claims[ruled].float().mean()) if claimed else None,
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
        clip_fraction=(sums.clipped_low + sums.clipped_high) / sums.tokens,
        clip_fraction_low=sums.clipped_low / sums.tokens,
        clip_fraction_high=sums.clipped_high / sums.tokens,
        ratio_mean=sums.ratio / sums.tokens,
        ratio_max=sums.largest_ratio,
        train_tokens_per_second=sums.computed / max(seconds, 1e-9),
        kl=None if sums.kl is None else sums.kl / sums.tokens,
        opd_kl=None if sums.distilled is None else sums.distilled / sums.tokens,
        off_policy_masked=None if sums.masked is None else sums.masked / sums.tokens,
        max_vio_per_layer=max_violations(sums.loads) if sums.loads else None,
        mismatch_share=sums.comparison.differing / sums.comparison.tokens,
        mismatch_max=sums.comparison.largest,
        mismatch_logprob=mismatch and mismatch.difference / tokens,
        mismatch_kl=mismatch and mismatch.kl / tokens,
        importance_truncated=mismatch and mismatch.truncated / tokens,
        routers_differ=replay.differ / replay.replayed if replay.replayed else mismatch and mismatch.routers_differ,
        mtp_loss=sums.mtp_loss,
    )


def readable_sample(rollout: Rollout, rewards: Rewards, step: int) -> str:
    """Question, completion, reference answer and reward of one completion of the rollout."""
    i = step % len(rollout.samples)
    sample = rollout.samples[i]
    said = "\n".join(message["content"] or "" for message in sample.turns) or sample.text
    answer = f"answer {sample.problem.answer}, " if rewards.ruled[i] else ""
    return f"{sample.problem.question}\n{said}\n[{answer}reward {rewards.total[i]:.2f}]"
