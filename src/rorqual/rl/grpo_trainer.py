"""One GRPO step (R1 §2.1): rollout, rewards, update. `rorqual.rl.rl_run` and the speedrun drive it."""

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import Transformer
from rorqual.model.moe import Routing
from rorqual.model.router_hooks import Replay, choices_of, replayed
from rorqual.plan.cost import flops_per_token
from rorqual.precision.convert import convert
from rorqual.precision.fp8_twin import FP8Twin
from rorqual.precision.recompute import Activations
from rorqual.recipe import RLRecipe
from rorqual.rl.envs.environment import Environment
from rorqual.rl.grpo import group_advantages, grpo_loss, on_policy_grad, token_weights, zero_std_groups
from rorqual.rl.mismatch import CAP, Mismatch, routers_differ
from rorqual.rl.rewards import Rewards, Verdict, score
from rorqual.rl.rollout import Rollout, derived_seed, sample_groups
from rorqual.rl.rollout_metrics import RLMetrics, UpdateSums, describe_rollout, describe_update, readable_sample
from rorqual.rl.rollout_packing import PackedRollout, pack_rollout, routing_table
from rorqual.rl.rollout_source import Fleet, RolloutSource
from rorqual.shapes import Float
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.balance import update_correction_bias
from rorqual.train.optimizer import Optimizer
from rorqual.train.schedule import bias_speed

MAX_SKIPPED = 3  # non-finite updates in a row before the run stops
# Saved in checkpoints; earlier versions did not save the last.
COUNTERS = ("steps", "tokens", "trained_tokens", "skipped_in_a_row", "flops", "evaluated_tokens")
OLD_COUNTERS = {"trained_tokens": "learnt"}  # keys of checkpoints written before they were renamed


class GRPOTrainer:
    """Policy, optimizer, reference model and problem streams.

    The engine samples from the policy's own weights, and rollouts from their FP8 twin with `grpo.rollout_weights`. A
    fleet samples rollouts apart from this process.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        environments: Sequence[Environment],
        recipe: RLRecipe,
        verdict: Verdict | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        """Convert `model` to the recipe's dtype in place. `verdict` replaces the reward of the self-verification.

        Raises UserError when two environments have the same name.
        """
        families = [e.family for e in environments]
        if len(set(families)) < len(families):
            raise UserError(f"environments {', '.join(families)}: names must differ; rename or merge the duplicates")
        self.model, self.recipe, self.section, self.verdict = model, recipe, recipe.grpo, verdict
        if recipe.precision is not None:
            for line in convert(model, recipe.precision).lines():
                print(line)
        self.activations = Activations(model, recipe.recompute)
        self.device = model.head_weight.device
        self.dtype = compute_dtype(recipe.model.dtype, self.device)
        self.optimizer = Optimizer(model, recipe.optimizer, self.dtype)
        rows, records = self.section.rollout_max_num_seqs, recipe.rollouts.replay_routing
        self.engine = self.sampler = Engine(model, tokenizer, max_num_seqs=rows, record_routing=records)
        self.twin = FP8Twin(model) if self.section.rollout_weights == "fp8" else None
        if self.twin is not None:
            self.sampler = Engine(self.twin.model, tokenizer, max_num_seqs=rows, record_routing=records)
        self.environments = {e.family: e for e in environments}
        self.stale = fleet is not None and fleet.staleness > 0
        self.rollouts = RolloutSource(recipe, environments, self.sampler, fleet)
        self.reference = self._frozen_copy() if self.section.kl else None
        self.steps = self.skipped_in_a_row = 0
        self.tokens = 0  # sampled
        self.trained_tokens = 0  # in forward and backward passes, prompts and padding included
        self.evaluated_tokens = 0  # sampled in evaluations
        self.flops = {"rollout": 0.0, "train": 0.0, "evaluate": 0.0}

    def step(self, progress: float = 0.0) -> RLMetrics:
        """Sample groups, score them, update the policy.

        `progress` of the run in [0, 1] sets the learning rate and when bias balancing stops. Raises UserError when
        three updates in a row are not finite.
        """
        section, skipped = self.section, self.skipped_in_a_row
        self.model.eval()
        if self.twin is not None:
            self.twin.refresh()
        served = self.rollouts.next(self.steps)
        rollout = served.rollout
        began = time.monotonic()
        rewards = score(rollout.samples, self.environments, self.recipe.reward, section.max_tokens, self.verdict)
        start = time.monotonic()
        sums = self._update(rollout, rewards, progress)
        update_seconds = time.monotonic() - start
        self._count(rollout, sums)
        metrics = RLMetrics(
            tokens=self.tokens,
            lr=self.recipe.optimizer.lr * self._lr_factor(progress),
            rollout=describe_rollout(rollout, rewards),
            update=describe_update(sums, update_seconds),
            sample=None if self.steps % self.recipe.sample_every else readable_sample(rollout, rewards, self.steps),
            rollout_seconds=rollout.seconds,
            reward_seconds=start - began,
            update_seconds=update_seconds,
            wait_seconds=served.wait_seconds,
            skipped=self.skipped_in_a_row > skipped,
            notes=self.rollouts.take_notes(),
            staleness=served.staleness,
            pushed_bytes=served.pushed_bytes,
        )
        self.steps += 1
        if self.reference is not None and section.refresh_reference and self.steps % section.refresh_reference == 0:
            self.reference.load_state_dict(self.model.state_dict())
        return metrics

    def evaluate(self, n: int) -> dict[str, float]:
        """pass@1 on `n` dev problems of each environment, one sample each: {"eval_<family>": fraction}."""
        params = SamplingParams(
            temperature=self.section.temperature,
            max_tokens=self.section.max_tokens,
            seed=derived_seed(self.recipe.seed, "eval"),
        )
        shares: dict[str, float] = {}
        self.model.eval()
        for family, environment in self.environments.items():
            problems = environment.problems("dev", n, self.recipe.seed)
            rollout = sample_groups(self.engine, problems, self.recipe.template, params)
            correct = score(rollout.samples, self.environments, self.recipe.reward, params.max_tokens).correct
            self.evaluated_tokens += rollout.tokens
            self.flops["evaluate"] += self._sampling_flops(rollout)
            shares[f"eval_{family}"] = float(correct.float().mean())
        return shares

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: model, optimizer, reference, and rollouts in flight."""
        reference: dict[str, Tensor] = self.reference.state_dict() if self.reference is not None else {}
        kept = {f"reference.{name}": t for name, t in reference.items()}
        return self.optimizer.tensors() | kept | self.rollouts.tensors()

    def state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint: counters and the position of each problem stream."""
        counters: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}
        return counters | self.rollouts.state()

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `tensors()` and `state()` returned. Raises UserError when they are another model's."""
        self.optimizer.load_tensors(tensors)
        if self.reference is not None:
            prefix = "reference."
            self.reference.load_state_dict(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
        self.rollouts.load(tensors, state)
        for name in COUNTERS:
            if name in state or name in OLD_COUNTERS:
                setattr(self, name, state[name] if name in state else state[OLD_COUNTERS[name]])
        self.flops = {"evaluate": 0.0} | self.flops

    def _lr_factor(self, progress: float) -> float:
        """Factor on the learning rate: linear warm-up, then linear decay at the end of the run."""
        left = (1.0 - progress) / self.recipe.decay if self.recipe.decay else 1.0
        return min(1.0, (self.steps + 1) / max(self.recipe.warmup_steps, 1), max(left, 0.0))

    def _update(self, rollout: Rollout, rewards: Rewards, progress: float) -> UpdateSums:
        """The optimizer steps of one rollout.

        A zero-std group has no gradient without a KL term: it then counts in the average (unless dropped) but is not
        computed.
        """
        section, G = self.section, self.section.group_size
        grouped = rewards.total.view(-1, G)
        advantages = group_advantages(grouped, section.normalise_std).flatten()
        zero_std = zero_std_groups(grouped)
        counted = (~zero_std if section.drop_zero_std_groups else torch.ones_like(zero_std)).nonzero().flatten()
        lengths = torch.tensor([len(c) for c in rollout.completions])
        sums = UpdateSums(mismatch=Mismatch(section.importance_cap or CAP) if self._corrects else None)
        self.model.train()
        weights = torch.zeros(len(lengths))
        updates: list[list[int]] = []
        for groups in counted.chunk(section.mini_batches):
            members = (groups[:, None] * G + torch.arange(G)).flatten()
            weights[members] = token_weights(lengths[members], section.average)
            computed = members if section.kl else members[~zero_std.repeat_interleave(G)[members]]
            updates += [[int(i) for i in computed]] if len(computed) else []
        old: list[list[float]] | None = None
        if section.mini_batches > 1:
            everyone = [i for members in updates for i in members]
            old = self._logprobs_before(rollout, everyone) if self._corrects and everyone else rollout.logprobs
        for members in updates:
            self._optimize(rollout, members, advantages, weights, old, progress, sums)
        return sums

    def _optimize(
        self,
        rollout: Rollout,
        members: list[int],
        advantages: Tensor,
        weights: Tensor,
        old_logprobs: list[list[float]] | None,
        progress: float,
        sums: UpdateSums,
    ) -> None:
        """One optimizer step on the completions `members`; advantages, weights [Q·G] and log-probabilities under π_old
        (None: π_old = π) are of all completions.

        Raises UserError when three updates in a row are not finite.
        """
        batches = self._packed(rollout, members)
        device = self.device
        advantages, weights = advantages[members].to(device), weights[members].to(device)
        old = None if old_logprobs is None else _flat(old_logprobs, members, device)
        sampled = _flat(rollout.logprobs, members, device)
        total_tokens = sum(packed.tokens.numel() for packed in batches)
        loads: list[Tensor] = []
        for packed in batches:
            packed = packed.to(device)
            with self._replayed(packed, sums.replay):
                routing: list[Routing] | None = [] if self._balances else None
                grad = None
                if old is None and self.reference is None and sums.mismatch is None:
                    grad = on_policy_grad(advantages, weights, packed.sequence)
                # A stale policy is gone, and a replay counts for itself.
                here = sums.mismatch is not None and not self.stale and packed.recorded is None
                unmeasured = here and sums.mismatch is not None and sums.mismatch.routers_differ is None
                gathered = choices_of(self.model) if unmeasured else nullcontext([])
                with self.activations.kept(), gathered as choices:
                    logprobs, entropy = self._logprobs(self.model, packed, routing, grad)
                reference = None
                if self.reference is not None:
                    with torch.no_grad():
                        reference, _ = self._logprobs(self.reference, packed)
                old_here, importance = None if old is None else old[packed.offset], None
                if sums.mismatch is not None:
                    before = logprobs.detach() if old_here is None else old_here
                    importance = sums.mismatch.weights(before, sampled[packed.offset])
                    if choices:
                        sums.mismatch.routers_differ = routers_differ(self.sampler.model.eval(), packed, choices)
                        self.model.train()
                loss = grpo_loss(
                    logprobs, old_here, reference, advantages, weights, packed.sequence, self.section, importance
                )
                total = loss.loss
                if routing:
                    # A micro-batch is one sequence of V3 eq. 17–20, weighted by its tokens.
                    share = self.recipe.balance.sequence_loss * packed.tokens.numel() / total_tokens
                    total = total + share * sum((r.sequence_loss for r in routing), total.new_zeros(()))
                    found = [r.load.detach() for r in routing]
                    loads = [a + b for a, b in zip(loads, found, strict=True)] if loads else found
                torch.autograd.backward(total)
                self.optimizer.accumulate()
                sums.tokens += len(packed.targets)
                sums.computed += packed.tokens.numel()
                sums.entropy += float(entropy.sum())
                sums.kl = float(loss.kl) + (sums.kl or 0.0) if reference is not None else None
                sums.clipped += float(loss.clipped)
        result = self.optimizer.step(self._lr_factor(progress))
        sums.grad_norms.append(result.grad_norm)
        sums.loads = loads
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"optimizer.lr = {self.recipe.optimizer.lr}: three updates in a row had no finite gradient, the last "
                f"at step {self.steps + 1}; the last checkpoint is intact, lower the learning rate"
            )
        speed = bias_speed(self.recipe.balance, progress)
        if speed and loads and not result.skipped:
            update_correction_bias(self.model, loads, speed)

    def _packed(self, rollout: Rollout, members: Sequence[int]) -> list[PackedRollout]:
        G, config = self.section.group_size, self.model.config
        prompt_of = [i // G for i in members]
        batches = pack_rollout(
            rollout.prompts,
            [rollout.completions[i] for i in members],
            prompt_of,
            self.section.micro_tokens,
            # 4x: attention computes the whole block, where the planner counts the causal half, and reaches half the
            # FLOP/s of linear layers (SmolLM2 in bfloat16 on a CPU, blocks of 300 tokens: 0.65 of 4.5 seconds).
            lambda length: flops_per_token(config, 4 * length),
        )
        if rollout.routing is None:
            return batches
        table = routing_table(rollout.prompts, [rollout.routing[i] for i in members], prompt_of)
        return [replace(packed, recorded=table[packed.origin]) for packed in batches]

    def _replayed(self, packed: PackedRollout, counts: Replay) -> AbstractContextManager[None]:
        """Context in which the policy's routers take the experts that the rollout recorded."""
        return nullcontext() if packed.recorded is None else replayed(self.model, packed.recorded, counts)

    @torch.no_grad()
    def _logprobs_before(self, rollout: Rollout, members: list[int]) -> list[list[float]]:
        """By completion, of `members` under the policy that is trained, before it is; of others there are none."""
        device = self.device
        sizes = [len(rollout.completions[i]) for i in members]
        found = torch.empty(sum(sizes), device=device)
        for packed in self._packed(rollout, members):
            packed = packed.to(device)
            with self._replayed(packed, Replay()):
                found[packed.offset] = self._logprobs(self.model, packed)[0].float()
        out: list[list[float]] = [[] for _ in rollout.completions]
        for i, part in zip(members, found.cpu().split_with_sizes(sizes), strict=True):
            out[i] = [float(p) for p in part]
        return out

    @property
    def _corrects(self) -> bool:
        """Whether rollouts or updates round, or rollouts are stale: the sampling policy is not the trained one."""
        return self.recipe.rounds or self.stale

    @property
    def _balances(self) -> bool:
        return self.recipe.balance.sequence_loss > 0 or self.recipe.balance.bias_speed > 0

    def _logprobs(
        self,
        model: Transformer,
        packed: PackedRollout,
        routing: list[Routing] | None = None,
        grad: Float[Tensor, " N"] | None = None,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probabilities and entropies of the targets under `model` at the sampling temperature.

        grad: dL/d log π where it is known before the backward pass.
        """
        hidden = model(packed.tokens, packed.positions, packed.mask, routing=routing)[0].index_select(0, packed.source)
        return token_logprobs(hidden, model.head_weight, packed.targets, self.section.temperature, grad)

    def _frozen_copy(self) -> Transformer:
        return copy.deepcopy(self.model).requires_grad_(False)

    def _count(self, rollout: Rollout, sums: UpdateSums) -> None:
        passes = 3 + (self.reference is not None)
        self.tokens += rollout.tokens
        self.trained_tokens += sums.computed
        self.flops["rollout"] += self._sampling_flops(rollout)
        self.flops["train"] += sums.computed * passes * self._flops_per_token(rollout)

    def _sampling_flops(self, rollout: Rollout) -> float:
        return (rollout.tokens + sum(map(len, rollout.prompts))) * self._flops_per_token(rollout)

    def _flops_per_token(self, rollout: Rollout) -> float:
        """Of a forward pass."""
        length = sum(map(len, rollout.prompts)) // len(rollout.prompts) + rollout.tokens // len(rollout.completions)
        return flops_per_token(self.model.config, length, training=False)


def _flat(logprobs: list[list[float]], members: list[int], device: torch.device) -> Tensor:
    return torch.tensor([p for i in members for p in logprobs[i]], device=device)
