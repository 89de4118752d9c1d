"""Predicted against published: one utilisation a chip family, fitted on some runs and tested on others."""

import math

import pytest

from rorqual.plan.layout import check, memory_by_rank
from rorqual.plan.published_runs import Calibration, calibration, published_runs

RUNS = {run.name: run for run in published_runs()}


@pytest.mark.parametrize("name", RUNS)
def test_layouts_are_possible(name):
    run = RUNS[name]
    assert check(run.layout, run.job) is None
    assert max(m.total for m in memory_by_rank(run.job, run.layout)) < 1.05 * run.chip.memory


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Llama 3.1 405B", "DeepSeek-V3 by Megatron", "LLaMA 65B"])
def test_runs_that_nothing_is_fitted_to_are_within_a_tenth(name):
    run = RUNS[name]
    assert not run.fitted
    assert run.predicted(calibration(run.chip.family).utilisation) == pytest.approx(run.tokens_a_second, rel=0.1)


def test_the_fit_gives_the_published_speed():
    run = RUNS["DeepSeek 67B"]
    assert run.predicted(run.fit()) == pytest.approx(run.tokens_a_second, rel=1e-6)
    utilisation = calibration("hopper").utilisation
    assert utilisation == pytest.approx(math.sqrt(run.fit() * RUNS["DeepSeek-V2"].fit()))


@pytest.mark.parametrize("family", ["hopper", "blackwell", "ampere"])
def test_most_published_runs_lie_within_the_interval(family):
    """80 % of them, as far as the few can: each family's spread is that of its own runs."""
    found = calibration(family)
    inside = []
    for run in published_runs():
        if run.chip.family == family:
            low, high = found.interval(1 / run.predicted(found.utilisation))
            inside.append(low <= 1 / run.tokens_a_second <= high)
    assert sum(inside) >= 0.8 * len(inside) or len(inside) < 5


def test_a_family_without_a_run_says_so():
    found = calibration("cdna3")
    assert "no published run of cdna3" in found.source
    assert found.spread > calibration("hopper").spread


def test_eight_of_ten_lie_within_an_interval():
    low, high = Calibration(0.5, 0.1, "").interval(100.0)
    assert (low, high) == (pytest.approx(100 * math.exp(-0.12816)), pytest.approx(100 * math.exp(0.12816)))
