import itertools

import pytest

from rorqual.recipe import BalanceSection, MTPSection, ScheduleSection, TrainSection
from rorqual.train.schedule import batch_size, bias_speed, mtp_weight, schedule_factor


def test_v3_follows_the_papers_learning_rates():
    section = ScheduleSection(name="v3", warmup=0.001)

    def lr(trillions):
        return 2.2e-4 * schedule_factor(section, trillions / 14.8)

    assert lr(0.001) == pytest.approx(2.2e-4 * 0.001 / 14.8 / 0.001)
    assert lr(1) == lr(9.99) == pytest.approx(2.2e-4)
    assert lr(12.15) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half-way down the cosine
    assert lr(14.31) == lr(14.6) == pytest.approx(2.2e-5)
    assert lr(14.64) == lr(14.8) == pytest.approx(7.3e-6)


def test_cosine_wsd_and_constant():
    cosine = ScheduleSection(name="cosine", warmup=0.2, final=0.1)
    assert [schedule_factor(cosine, x) for x in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    wsd = ScheduleSection(name="wsd", warmup=0.1, decay=0.4, final=0.2)
    assert [schedule_factor(wsd, x) for x in (0.05, 0.3, 0.6, 0.8, 1)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])
    constant = ScheduleSection(name="constant", warmup=0)
    assert [schedule_factor(constant, x) for x in (0, 0.5, 1)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["v3", "cosine", "wsd", "constant"])
def test_factor_stays_within_bounds_at_the_edges(name):
    longest = 10 / 14.8 if name == "v3" else 1.0
    for warmup, decay in ((0.0, 0.0), (0.0, 1.0), (longest, 0.0), (0.5, 0.5)):
        section = ScheduleSection(name=name, warmup=warmup, decay=decay)
        assert all(0 <= schedule_factor(section, x) <= 1 for x in (-0.1, 0, 0.5, 1, 1.1))
        factors = [schedule_factor(section, (step + 0.5) / 1000) for step in range(961)]  # v3 has steps after that
        assert max(abs(a - b) for a, b in itertools.pairwise(factors)) < 0.01


def test_switches():
    assert [mtp_weight(MTPSection(), x) for x in (0.67, 0.69)] == [0.3, 0.1]
    assert [bias_speed(BalanceSection(), x) for x in (0.96, 0.98)] == [0.001, 0.0]


def test_batch_ramp():
    section = TrainSection(steps=10, batch_size=15360, batch_ramp=(3072, 0.5))
    assert [batch_size(section, x) for x in (0, 0.25, 0.5, 1)] == [3072, 9216, 15360, 15360]
    assert batch_size(TrainSection(steps=10, batch_size=8), 0.0) == 8
