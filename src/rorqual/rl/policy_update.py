"""The updates of one RL step: from a rollout and its rewards to optimizer steps on the policy (R1 §2.1)."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.adapters.lora import AdapterReference
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.model.moe import Routing
from rorqual.model.router_hooks import choices_of
from rorqual.precision.recompute import Activations
from rorqual.recipe import RLRecipe
from rorqual.rl.grpo import (
    group_advantages,
    grpo_loss,
    off_policy_masked,
    on_policy_grad,
    token_weights,
    zero_std_groups,
)
from rorqual.rl.mismatch import CAP, Mismatch, routers_differ
from rorqual.rl.mtp_update import MTPUpdate
from rorqual.rl.rewards import Rewards
from rorqual.rl.rollout import Rollout
from rorqual.rl.rollout_logprobs import (
    hidden_states,
    pack_members,
    replaying,
    rollout_logprobs,
    target_logprobs,
)
from rorqual.rl.rollout_metrics import UpdateSums
from rorqual.rl.rollout_packing import PackedRollout
from rorqual.rl.teachers import Teachers
from rorqual.shapes import Float
from rorqual.train.balance import update_correction_bias
from rorqual.train.optimizer import Optimizer
from rorqual.train.schedule import bias_speed

MAX_SKIPPED = 3  # non-finite updates in a row before the run stops


@dataclass
class _Update:
    """What one optimizer step trains on: S completions and their N tokens, which micro-batches index."""

    advantages: Tensor  # [S]
    weights: Tensor  # [S] of a token of each
    old: Tensor | None  # [N] log-probabilities under π_old; None: π_old = π
    sampled: Tensor  # [N] under the policy that sampled


class PolicyUpdate:
    """Policy, optimizer, reference model and teachers."""

    def __init__(
        self,
        model: Transformer,
        sampling: Transformer,
        recipe: RLRecipe,
        optimizer: Optimizer,
        stale: bool,
        teachers: Teachers | None = None,
    ) -> None:
        """`sampling`: the model that rollouts are from, `model` itself or its twin. stale: rollouts may be from
        weights of earlier steps.
        """
        self.model, self.sampling, self.recipe, self.section = model, sampling, recipe, recipe.grpo
        self.optimizer, self.stale, self.teachers = optimizer, stale, teachers
        self.activations = Activations(model, recipe.recompute)
        self.has_experts = bool(model.config.n_routed_experts)
        self.device = model.head_weight.device
        self.reference = reference_of(model, recipe) if recipe.grpo.kl else None
        self.mtp = MTPUpdate(model, recipe) if recipe.mtp.weight else None
        self.skipped_in_a_row = 0

    def __call__(self, rollout: Rollout, rewards: Rewards, lr_factor: float, progress: float, step: int) -> UpdateSums:
        """The optimizer steps of one rollout, that of step `step`, at `lr_factor` of the recipe's learning rate.

        `progress` of the run in [0, 1] sets when bias balancing stops. A zero-std group has no gradient without a KL
        term or a teacher: it then counts in the average (unless dropped) but is not computed; with `mask_truncated`
        truncated completions do neither. Raises UserError when three updates in a row are not finite.
        """
        section, G = self.section, self.section.group_size
        sums = UpdateSums(mismatch=self._mismatch(), distilled=0.0 if self.teachers else None)
        if not rollout.problems:
            return sums
        grouped = rewards.grouped(G)
        kept = (~rewards.skipped).view(-1, G).sum(1) if bool(rewards.skipped.any()) else None
        advantages = group_advantages(grouped, section.normalise_std, kept).flatten()
        zero_std = zero_std_groups(grouped)
        counted = (~zero_std if section.drop_zero_std_groups else torch.ones_like(zero_std)).nonzero().flatten()
        truncated = torch.tensor([s.truncated for s in rollout.samples], dtype=torch.bool)
        lengths = rollout.lengths
        self.model.train()
        if self.mtp is not None:
            self.mtp.begin()
        weights = torch.zeros(len(lengths))
        updates: list[list[int]] = []
        for groups in counted.chunk(section.mini_batches):
            members = (groups[:, None] * G + torch.arange(G)).flatten()
            left_out = rewards.skipped | truncated if section.mask_truncated else rewards.skipped
            members = members[~left_out[members]]
            weights[members] = token_weights(lengths[members], section.average, section.max_tokens)
            everyone = section.kl or self.teachers is not None
            computed = members if everyone else members[~zero_std.repeat_interleave(G)[members]]
            updates += [[int(i) for i in computed]] if len(computed) else []
        old: list[list[float]] | None = None
        if section.mini_batches > 1:
            trained = [i for members in updates for i in members]
            old = self.logprobs_before(rollout, trained) if self._measures and trained else rollout.logprobs
        for members in updates:
            update = _Update(
                advantages[members].to(self.device),
                weights[members].to(self.device),
                None if old is None else _flat(old, members, self.device),
                _flat(rollout.logprobs, members, self.device),
            )
            self._optimize(rollout, members, update, sums, lr_factor)
            self._balance(sums.loads, progress)
            if self.skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"optimizer.lr = {self.recipe.optimizer.lr}: three updates in a row had no finite gradient, the "
                    f"last at step {step + 1}; the last checkpoint is intact, lower the learning rate"
                )
        sums.mtp_loss = None if self.mtp is None else self.mtp.loss
        return sums

    def logprobs_before(self, rollout: Rollout, members: Sequence[int]) -> list[list[float]]:
        """By completion, of `members` under the policy that is trained, before it is; of others there are none."""
        return rollout_logprobs(self.model, rollout, members, self.section)

    def _optimize(
        self, rollout: Rollout, members: list[int], update: _Update, sums: UpdateSums, lr_factor: float
    ) -> None:
        """One optimizer step on the completions `members`."""
        batches = self._micro_batches(rollout, members)
        total_tokens = sum(packed.tokens.numel() for packed, _ in batches)
        loads: list[Tensor] = []
        for packed, teacher in batches:
            packed = packed.to(self.device)
            with replaying(self.model, packed, sums.replay):
                routing: list[Routing] | None = [] if self.has_experts else None
                total, hidden = self._loss(packed, update, teacher, routing, sums)
                if routing and self.recipe.balance.sequence_loss:
                    # A micro-batch is one sequence of V3 eq. 17–20, weighted by its tokens.
                    share = self.recipe.balance.sequence_loss * packed.tokens.numel() / total_tokens
                    total = total + share * sum((r.sequence_loss for r in routing), total.new_zeros(()))
                if routing:
                    found = [r.load.detach() for r in routing]
                    loads = [a + b for a, b in zip(loads, found, strict=True)] if loads else found
                torch.autograd.backward(total)
                if self.mtp is not None:
                    self.mtp.backward(hidden, packed, [each for each, _ in batches])
                self.optimizer.accumulate()
        result = self.optimizer.step(lr_factor)
        sums.grad_norms.append(result.grad_norm)
        sums.loads = loads
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0

    def _loss(
        self,
        packed: PackedRollout,
        update: _Update,
        teacher: str | None,
        routing: list[Routing] | None,
        sums: UpdateSums,
    ) -> tuple[Tensor, Float[Tensor, "1 T D"]]:
        """A micro-batch's part of the loss, without balancing, and the last hidden states; adds to the sums."""
        section, sequence = self.section, packed.sequence
        plain = self.reference is None and teacher is None and section.off_policy_mask is None
        grad = None
        if plain and update.old is None and sums.mismatch is None:
            grad = on_policy_grad(update.advantages, update.weights, sequence)
        # A stale policy is gone, and a replay counts for itself.
        here = sums.mismatch is not None and not self.stale and packed.recorded is None
        unmeasured = here and sums.mismatch is not None and sums.mismatch.routers_differ is None
        gathered = choices_of(self.model) if unmeasured else nullcontext([])
        with self.activations.kept(), gathered as choices:
            hidden = hidden_states(self.model, packed, routing)
            states = hidden[0].index_select(0, packed.source)
            logprobs, entropy = target_logprobs(self.model, states, packed, section.temperature, grad)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                their = hidden_states(self.reference, packed)[0].index_select(0, packed.source)
                reference, _ = target_logprobs(self.reference, their, packed, section.temperature)
        old = None if update.old is None else update.old[packed.offset]
        before = logprobs.detach() if old is None else old
        sampled, importance = update.sampled[packed.offset], None
        if not sums.grad_norms:  # before the first update
            sums.comparison.add(logprobs.detach(), sampled)
        if sums.mismatch is not None:
            importance = sums.mismatch.weights(before, sampled, sequence)
            if choices:
                sums.mismatch.routers_differ = routers_differ(self.sampling.eval(), packed, choices)
                self.model.train()
        if section.off_policy_mask is not None:
            delta = section.off_policy_mask
            masked = off_policy_masked(logprobs, sampled, update.advantages, sequence, delta)[sequence]
            importance = (torch.ones_like(before) if importance is None else importance).masked_fill(masked, 0.0)
            sums.masked = (sums.masked or 0) + int(masked.sum())
        token_advantages, divergence = None, None
        if teacher is not None and self.teachers is not None:
            theirs = self.teachers.states(teacher, packed)
            if self.teachers.section.loss == "full":
                divergence = self.teachers.divergence(teacher, theirs, packed, self.model, states)
                sums.add_taught(teacher, packed.tokens.numel(), divergence.detach())
            else:
                theirs = self.teachers.logprobs(teacher, theirs, packed)
                token_advantages = self.teachers.section.weight * (theirs - before)
                sums.add_taught(teacher, packed.tokens.numel(), logprobs.detach() - theirs)
        loss = grpo_loss(
            logprobs, old, reference, update.advantages, update.weights, sequence, section, importance,
            sampled if sums.mismatch is not None else None, token_advantages,
        )  # fmt: skip
        sums.add(loss, len(packed.targets), packed.tokens.numel(), float(entropy.sum()), reference is not None)
        if divergence is None or self.teachers is None:
            return loss.loss, hidden
        taught = (divergence * update.weights[sequence]).sum()
        return loss.loss + self.teachers.section.weight * taught, hidden

    def _micro_batches(self, rollout: Rollout, members: list[int]) -> list[tuple[PackedRollout, str | None]]:
        """With the path of the teacher of all completions in it."""
        if self.teachers is None:
            return [(packed, None) for packed in pack_members(rollout, members, self.section, self.model)]
        paths = self.teachers.of([rollout.samples[i].problem.family for i in members])
        return [
            (packed, path)
            for path in dict.fromkeys(paths)
            for packed in pack_members(rollout, members, self.section, self.model, [own == path for own in paths])
        ]

    def _balance(self, loads: list[Tensor], progress: float) -> None:
        speed = bias_speed(self.recipe.balance, progress)
        if speed and loads and not self.skipped_in_a_row:
            update_correction_bias(self.model, loads, speed)

    @property
    def _measures(self) -> bool:
        """Whether the log-probabilities of sampling and training are compared."""
        return self.recipe.measures_mismatch or self.stale

    def _mismatch(self) -> Mismatch | None:
        if not self._measures:
            return None
        return Mismatch(self.section.importance_cap or CAP, self.section.correction or "token-truncate")


def reference_of(model: Transformer, recipe: RLRecipe) -> Transformer | AdapterReference:
    """π_ref as π is now: a copy of the model, with LoRA of its updates alone."""
    return AdapterReference(model) if recipe.lora is not None else copy.deepcopy(model).requires_grad_(False)


def _flat(logprobs: list[list[float]], members: list[int], device: torch.device) -> Tensor:
    return torch.tensor([p for i in members for p in logprobs[i]], device=device)
