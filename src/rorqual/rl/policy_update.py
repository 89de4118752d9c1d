"""The updates of one RL step: from a rollout and its rewards to optimizer steps on the policy (R1 §2.1)."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.model import Transformer
from rorqual.model.moe import Routing
from rorqual.model.router_hooks import Replay, choices_of, replayed
from rorqual.plan.cost import flops_per_token
from rorqual.precision.recompute import Activations
from rorqual.recipe import RLRecipe
from rorqual.rl.grpo import group_advantages, grpo_loss, on_policy_grad, token_weights, zero_std_groups
from rorqual.rl.mismatch import CAP, Mismatch, routers_differ
from rorqual.rl.rewards import Rewards
from rorqual.rl.rollout import Rollout
from rorqual.rl.rollout_metrics import UpdateSums
from rorqual.rl.rollout_packing import PackedRollout, pack_rollout, routing_table
from rorqual.shapes import Float
from rorqual.train.balance import update_correction_bias
from rorqual.train.optimizer import Optimizer
from rorqual.train.schedule import bias_speed

MAX_SKIPPED = 3  # non-finite updates in a row before the run stops


class PolicyUpdate:
    """Policy, optimizer and reference model."""

    def __init__(
        self, model: Transformer, sampling: Transformer, recipe: RLRecipe, optimizer: Optimizer, stale: bool
    ) -> None:
        """`sampling`: the model that rollouts are from, `model` itself or its FP8 twin. stale: rollouts may be from
        weights of earlier steps.
        """
        self.model, self.sampling, self.recipe, self.section = model, sampling, recipe, recipe.grpo
        self.optimizer, self.stale = optimizer, stale
        self.activations = Activations(model, recipe.recompute)
        self.device = model.head_weight.device
        self.reference = copy.deepcopy(model).requires_grad_(False) if recipe.grpo.kl else None
        self.skipped_in_a_row = 0

    def __call__(self, rollout: Rollout, rewards: Rewards, lr_factor: float, progress: float, step: int) -> UpdateSums:
        """The optimizer steps of one rollout, that of step `step`, at `lr_factor` of the recipe's learning rate.

        `progress` of the run in [0, 1] sets when bias balancing stops. A zero-std group has no gradient without a KL
        term: it then counts in the average (unless dropped) but is not computed. Raises UserError when three updates in
        a row are not finite.
        """
        section, G = self.section, self.section.group_size
        grouped = rewards.grouped(G)
        advantages = group_advantages(grouped, section.normalise_std).flatten()
        zero_std = zero_std_groups(grouped)
        counted = (~zero_std if section.drop_zero_std_groups else torch.ones_like(zero_std)).nonzero().flatten()
        lengths = torch.tensor(rollout.lengths)
        sums = UpdateSums(mismatch=Mismatch(section.importance_cap or CAP) if self._corrects else None)
        self.model.train()
        weights = torch.zeros(len(lengths))
        updates: list[list[int]] = []
        for groups in counted.chunk(section.mini_batches):
            members = (groups[:, None] * G + torch.arange(G)).flatten()
            members = members[~rewards.skipped[members]]
            weights[members] = token_weights(lengths[members], section.average)
            computed = members if section.kl else members[~zero_std.repeat_interleave(G)[members]]
            updates += [[int(i) for i in computed]] if len(computed) else []
        old: list[list[float]] | None = None
        if section.mini_batches > 1:
            everyone = [i for members in updates for i in members]
            old = self.logprobs_before(rollout, everyone) if self._corrects and everyone else rollout.logprobs
        for members in updates:
            self._optimize(rollout, members, advantages, weights, old, sums, lr_factor)
            self._balance(sums.loads, progress)
            if self.skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"optimizer.lr = {self.recipe.optimizer.lr}: three updates in a row had no finite gradient, the "
                    f"last at step {step + 1}; the last checkpoint is intact, lower the learning rate"
                )
        return sums

    def _optimize(
        self,
        rollout: Rollout,
        members: list[int],
        advantages: Tensor,
        weights: Tensor,
        old_logprobs: list[list[float]] | None,
        sums: UpdateSums,
        lr_factor: float,
    ) -> None:
        """One optimizer step on the completions `members`; advantages, weights [Q·G] and log-probabilities under π_old
        (None: π_old = π) are of all completions.
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
                        sums.mismatch.routers_differ = routers_differ(self.sampling.eval(), packed, choices)
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
        result = self.optimizer.step(lr_factor)
        sums.grad_norms.append(result.grad_norm)
        sums.loads = loads
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0

    def _balance(self, loads: list[Tensor], progress: float) -> None:
        speed = bias_speed(self.recipe.balance, progress)
        if speed and loads and not self.skipped_in_a_row:
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
            [rollout.sampled[i] for i in members],
        )
        if rollout.routing is None:
            return batches
        table = routing_table(rollout.prompts, [rollout.routing[i] for i in members], prompt_of)
        return [replace(packed, recorded=table[packed.origin]) for packed in batches]

    def _replayed(self, packed: PackedRollout, counts: Replay) -> AbstractContextManager[None]:
        """Context in which the policy's routers take the experts that the rollout recorded."""
        return nullcontext() if packed.recorded is None else replayed(self.model, packed.recorded, counts)

    @torch.no_grad()
    def logprobs_before(self, rollout: Rollout, members: list[int]) -> list[list[float]]:
        """By completion, of `members` under the policy that is trained, before it is; of others there are none."""
        device = self.device
        sizes = [rollout.lengths[i] for i in members]
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


def _flat(logprobs: list[list[float]], members: list[int], device: torch.device) -> Tensor:
    return torch.tensor([p for i in members for p in logprobs[i]], device=device)
