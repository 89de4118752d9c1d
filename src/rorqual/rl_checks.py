"""Settings of a recipe for RL that contradict each other. Each check raises ValueError with one sentence."""

from collections.abc import Sequence

from rorqual.rl_sections import GRPOSection, OPDSection

PARTS = ("accuracy", "format", "language", "length", "verdict", "functions")  # of a reward


def check_rl(
    grpo: GRPOSection, opd: OPDSection | None, environments: Sequence[str], differs: bool, rewarded: bool
) -> None:
    """differs: rollouts or updates round, or rollouts are stale. rewarded: some part of the reward has a weight."""
    _check_correction(grpo, differs)
    _check_distillation(grpo, opd, environments, rewarded)


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
