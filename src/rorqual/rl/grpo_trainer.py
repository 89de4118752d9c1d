"""One GRPO step (R1 §2.1): rollout, rewards, update. `rorqual.rl.rl_run` and the speedrun drive it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rorqual.adapters.lora import AdapterReference
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import Transformer
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.precision.convert import convert
from rorqual.precision.exact import make_exact
from rorqual.precision.rollout_twin import twin_of
from rorqual.recipe import RLRecipe
from rorqual.rl.envs.environment import Environment, Sample
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.grpo import groups_with_spread
from rorqual.rl.policy_update import PolicyUpdate
from rorqual.rl.reward_scorer import RewardScorer
from rorqual.rl.rewards import Rewards, Verdict, score
from rorqual.rl.rollout import Rollout, derived_seed, members_of
from rorqual.rl.rollout_metrics import RLMetrics, UpdateSums, describe_rollout, describe_update, readable_sample
from rorqual.rl.rollout_source import Fleet, RolloutSource, Served
from rorqual.rl.teachers import Teachers
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.optimizer import Optimizer

MAX_SKIPPED = 3  # non-finite updates in a row before the run stops
# Saved in checkpoints; earlier versions did not save the last.
COUNTERS = ("steps", "tokens", "trained_tokens", "skipped_in_a_row", "flops", "evaluated_tokens")
OLD_COUNTERS = {"trained_tokens": "learnt"}  # keys of checkpoints written before they were renamed


@dataclass
class _Drawn:
    """What was sampled for a step."""

    rollout: Rollout
    rewards: Rewards
    last: Served
    draws: int
    wait_seconds: float
    reward_seconds: float


class GRPOTrainer:
    """Policy, optimizer, reference model and problem streams.

    The engine samples from the policy's own weights, and rollouts from their twin in fewer bits with
    `grpo.rollout_weights`. A fleet samples rollouts apart from this process.
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
        self.device = model.head_weight.device
        self.dtype = compute_dtype(recipe.model.dtype, self.device)
        self.optimizer = Optimizer(model, recipe.optimizer, self.dtype)
        if recipe.exact:
            make_exact(model)
        rows, records = self.section.rollout_max_num_seqs, recipe.rollouts.replay_routing
        several = any(e.turns > 1 for e in environments)  # whose later turns find the earlier ones in a prefix cache
        self.engine = self.sampler = Engine(
            model, tokenizer, max_num_seqs=rows, prefix_cache=several, record_routing=records
        )
        weights = self.section.rollout_weights
        self.twin = None if weights is None else twin_of(model, weights, self.dtype)
        if self.twin is not None:
            self.sampler = Engine(
                self.twin.model, tokenizer, max_num_seqs=rows, prefix_cache=several, record_routing=records
            )
        self.environments = {e.family: e for e in environments}
        self.rollouts = RolloutSource(recipe, environments, self.sampler, fleet)
        stale, teachers = fleet is not None and fleet.staleness > 0, None
        if recipe.opd is not None:
            teachers = Teachers.load(recipe.opd, recipe.grpo, families, model.config, self.dtype, self.device)
        self.update = PolicyUpdate(model, self.sampler.model, recipe, self.optimizer, stale, teachers)
        judge = recipe.reward.model
        self.scorer = None if judge is None else RewardScorer.load(judge, self.dtype, self.device)
        self.steps = 0
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
        drawn = self._draw()
        rollout, rewards, served = drawn.rollout, drawn.rewards, drawn.last
        trained = rollout, rewards
        if section.max_draws > 1:
            groups = groups_with_spread(rewards.grouped(section.group_size), section.questions_per_step)
            trained = rollout.of_groups(groups), rewards.of(members_of(groups, section.group_size))
        start = time.monotonic()
        sums = self.update(*trained, self._lr_factor(progress), progress, self.steps)
        update_seconds = time.monotonic() - start
        self._count(rollout, sums)
        metrics = RLMetrics(
            tokens=self.tokens,
            lr=self.recipe.optimizer.lr * self._lr_factor(progress),
            rollout=describe_rollout(rollout, rewards, drawn.draws),
            update=describe_update(sums, update_seconds),
            sample=None if self.steps % self.recipe.sample_every else readable_sample(rollout, rewards, self.steps),
            rollout_seconds=rollout.seconds,
            reward_seconds=drawn.reward_seconds,
            update_seconds=update_seconds,
            wait_seconds=drawn.wait_seconds,
            skipped=self.skipped_in_a_row > skipped,
            notes=self.rollouts.take_notes() + rewards.notes,
            staleness=served.staleness,
            pushed_bytes=served.pushed_bytes,
        )
        self.steps += 1
        if self.reference is not None and section.refresh_reference and self.steps % section.refresh_reference == 0:
            self.reference.load_state_dict(self.model.state_dict())
        return metrics

    def _draw(self) -> "_Drawn":
        """A rollout; with `max_draws` more of them, as long as too few groups' rewards differ (DAPO §3.2)."""
        section = self.section
        rollouts: list[Rollout] = []
        rewards: list[Rewards] = []
        waited = scoring = 0.0
        while True:
            served = self.rollouts.next(self.steps, len(rollouts))
            began = time.monotonic()
            samples = served.rollout.samples
            rewards.append(self._scored(samples))
            rollouts.append(served.rollout)
            waited, scoring = waited + served.wait_seconds, scoring + time.monotonic() - began
            whole = Rewards.joined(rewards)
            spread = groups_with_spread(whole.total.view(-1, section.group_size), section.questions_per_step)
            if len(rollouts) == section.max_draws or len(spread) == section.questions_per_step:
                return _Drawn(Rollout.joined(rollouts), whole, served, len(rollouts), waited, scoring)

    def _scored(self, samples: Sequence[Sample]) -> Rewards:
        before = self.scorer.flops if self.scorer else 0.0
        reward, limit = self.recipe.reward, self.section.max_tokens
        found = score(samples, self.environments, reward, limit, self.verdict, self.scorer)
        self.flops["train"] += self.scorer.flops - before if self.scorer else 0.0
        return found

    def evaluate(self, n: int) -> dict[str, float]:
        """pass@1 on `n` dev problems of each environment that is not open: {"eval_<family>": fraction}."""
        params = SamplingParams(
            temperature=self.section.temperature,
            max_tokens=self.section.max_tokens,
            seed=derived_seed(self.recipe.seed, "eval"),
        )
        shares: dict[str, float] = {}
        self.model.eval()
        for family, environment in self.environments.items():
            if environment.open:
                continue
            problems = environment.problems("dev", n, self.recipe.seed)
            rollout = sample_rollout(self.engine, problems, self.recipe.template, params, self.environments)
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

    @property
    def reference(self) -> Transformer | AdapterReference | None:
        """π_ref; None without a KL term."""
        return self.update.reference

    @property
    def skipped_in_a_row(self) -> int:
        """Updates without a finite gradient since the last with one."""
        return self.update.skipped_in_a_row

    @skipped_in_a_row.setter
    def skipped_in_a_row(self, value: int) -> None:
        self.update.skipped_in_a_row = value

    def _lr_factor(self, progress: float) -> float:
        """Factor on the learning rate: linear warm-up, then linear decay at the end of the run."""
        left = (1.0 - progress) / self.recipe.decay if self.recipe.decay else 1.0
        return min(1.0, (self.steps + 1) / max(self.recipe.warmup_steps, 1), max(left, 0.0))

    def _count(self, rollout: Rollout, sums: UpdateSums) -> None:
        frozen = self.recipe.lora is not None
        length = self._length(rollout)
        each = flops_per_token(self.model.config, length, frozen=frozen)
        each += (self.reference is not None) * self._flops_per_token(rollout)
        if self.recipe.mtp.weight:
            each += mtp_flops_per_token(self.model.config, length, frozen)
        self.tokens += rollout.tokens
        self.trained_tokens += sums.computed
        self.flops["rollout"] += self._sampling_flops(rollout)
        self.flops["train"] += sums.computed * each
        for path, tokens in sums.taught.items():
            assert self.update.teachers is not None
            self.flops["train"] += tokens * self._flops_per_token(rollout, self.update.teachers.models[path])

    def _sampling_flops(self, rollout: Rollout) -> float:
        return sum(map(len, rollout.completions + rollout.prompts)) * self._flops_per_token(rollout)

    def _flops_per_token(self, rollout: Rollout, model: Transformer | None = None) -> float:
        """Of a forward pass, of the policy or another model."""
        return flops_per_token((model or self.model).config, self._length(rollout), training=False)

    def _length(self, rollout: Rollout) -> int:
        """Mean tokens of a prompt and what follows it."""
        after = sum(map(len, rollout.completions)) // len(rollout.completions)
        return sum(map(len, rollout.prompts)) // len(rollout.prompts) + after
