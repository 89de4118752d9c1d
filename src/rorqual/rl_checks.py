"""Settings of a recipe for RL that contradict each other. Each check raises ValueError with one sentence."""

from collections.abc import Sequence

from rorqual.rl_sections import EnvironmentSection, GRPOSection, OPDSection, RewardSection

PARTS = ("accuracy", "format", "language", "length", "verdict", "functions", "model")  # of a reward


def check_rl(
    grpo: GRPOSection, opd: OPDSection | None, environments: Sequence[str], differs: bool, rewarded: bool
) -> None:
    """differs: rollouts or updates round, or rollouts are stale. rewarded: some part of the reward has a weight."""
    _check_correction(grpo, differs)
    _check_distillation(grpo, opd, environments, rewarded)


def check_open(
    environments: Sequence[EnvironmentSection], reward: RewardSection, taught: bool, evaluates: bool
) -> None:
    """Of open environments. taught: a teacher says how good each token is. evaluates: pass@1 is measured."""
    ours = [section.name for section in environments if section.open]
    if reward.model is not None and not ours:
        raise ValueError(
            "reward.model: it scores answers to open problems, and no environment has open = true; add one, or leave "
            "it out"
        )
    if ours and reward.rewards_no_open and not taught:
        raise ValueError(
            f"environment {ours[0]}: open = true, but nothing rewards its answers; set reward.model, or give format, "
            "language or length a weight"
        )
    if evaluates and len(ours) == len(environments):
        raise ValueError("eval_every: all environments are open, so there is no pass@1 to measure; leave it out")


def _check_correction(grpo: GRPOSection, differs: bool) -> None:
    if grpo.importance_cap is not None and grpo.correction == "none":
        raise ValueError(
            "grpo.importance_cap: with grpo.correction = 'none' nothing is corrected; leave one of them out"
        )
    if grpo.importance_cap is not None and grpo.correction is None and not differs:
        raise ValueError(
            "grpo.importance_cap: nothing is rounded or stale, so there is nothing to correct; set "
            "grpo.rollout_weights, precision, rollouts.staleness or grpo.correction, or leave it out"
        )
    if grpo.off_policy_mask is not None and grpo.mini_batches == 1 and not differs:
        raise ValueError(
            f"grpo.off_policy_mask = {grpo.off_policy_mask:g}: with mini_batches = 1 and nothing rounded or stale "
            "every output is on-policy, so none is masked; raise grpo.mini_batches, set rollouts.staleness, or leave "
            "it out"
        )


def _check_distillation(grpo: GRPOSection, opd: OPDSection | None, environments: Sequence[str], rewarded: bool) -> None:
    if opd is None:
        if grpo.algorithm == "opd":
            raise ValueError(
                "grpo.algorithm = 'opd' needs a teacher; set opd.teacher to a model's directory, or take another "
                "algorithm"
            )
        if not rewarded:
            raise ValueError(
                f"reward: {', '.join(PARTS)} all have weight 0, so there is no reward; set one above 0, or opd.teacher"
            )
        return
    for name in opd.teachers:
        if name not in environments:
            raise ValueError(
                f"opd.teachers.{name}: there is no such environment; those of this recipe are {', '.join(environments)}"
            )
    for name in environments:
        if opd.of(name) is None:
            raise ValueError(f"opd.teachers: environment {name} has none; name one, or set opd.teacher for all others")
    if rewarded:
        return
    for name, value in (("drop_zero_std_groups", grpo.drop_zero_std_groups), ("max_draws", grpo.max_draws > 1)):
        if value:
            raise ValueError(
                f"grpo.{name} = {str(getattr(grpo, name)).lower()}: without a reward no group's rewards differ, so "
                "none would be trained on; leave it out, or give the reward a weight"
            )
