"""Predicted against published: one utilisation a chip family, fitted on some runs and tested on others."""

import math

import pytest

from rorqual.plan.cost import flops_by_layer, layer_parameters, parameters
from rorqual.plan.layout import check, memory_by_rank
from rorqual.plan.published_runs import Calibration, calibration, published_runs

RUNS = {run.name: run for run in published_runs()}


@pytest.mark.parametrize("name", RUNS)
def test_layouts_are_possible(name):
    run = RUNS[name]
    assert check(run.layout, run.job) is None
    assert max(m.total for m in memory_by_rank(run.job, run.layout)) < 1.05 * run.chip.memory


HELD_OUT = [
    "DeepSeek-V3", "Llama 3.1 405B", "DeepSeek-V3 by Megatron", "Qwen3 235B by Megatron",
    "Kimi K2 on GB300, by Megatron", "LLaMA 65B",
]  # fmt: skip


@pytest.mark.parametrize("name", HELD_OUT)
def test_runs_that_nothing_is_fitted_to_are_within_a_tenth(name):
    run = RUNS[name]
    assert not run.fitted
    assert run.predicted(calibration(run.chip.family).utilisation) == pytest.approx(run.tokens_a_second, rel=0.1)


def test_qwen3_has_its_published_sizes():
    """235 B and 22 B (its model card), and attention's FLOPs of 64 heads of 128: 4 · 128 · 64 for each token before."""
    config = RUNS["Qwen3 235B by Megatron"].job.config
    total, active = parameters(config)
    assert (total / 1e9, active / 1e9) == (pytest.approx(235, abs=0.5), pytest.approx(22, abs=0.5))
    keys = 2 * 4096 * 4 * 128
    assert layer_parameters(config, True).shared - 2 * 4096 * 64 * 128 - 128 * 4096 - 2 * 4096 - 240 == keys
    assert flops_by_layer(config, 4096)[0].attention == 4 * 128 * 64 * 2048


def test_the_fit_gives_the_published_speed():
    run = RUNS["DeepSeek 67B"]
    assert run.predicted(run.fit()) == pytest.approx(run.tokens_a_second, rel=1e-6)
    utilisation = calibration("hopper").utilisation
    assert utilisation == pytest.approx(math.sqrt(run.fit() * RUNS["DeepSeek-V2"].fit()))


@pytest.mark.parametrize("family", ["hopper", "blackwell", "ampere"])
def test_most_published_runs_lie_within_the_interval(family):
    """80 % of them: each family's spread is that of its own runs."""
    found = calibration(family)
    inside = []
    for run in published_runs():
        if run.chip.family == family:
            low, high = found.interval(1 / run.predicted(found.utilisation))
            inside.append(low <= 1 / run.tokens_a_second <= high)
    assert sum(inside) >= 0.8 * len(inside)


def test_a_family_without_a_run_says_so():
    found = calibration("cdna3")
    assert "no published run of cdna3" in found.source
    assert found.spread > calibration("hopper").spread


def test_eight_of_ten_lie_within_an_interval():
    low, high = Calibration(0.5, 0.1, "").interval(100.0)
    assert (low, high) == (pytest.approx(100 * math.exp(-0.12816)), pytest.approx(100 * math.exp(0.12816)))
