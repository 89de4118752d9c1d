"""Which of several ranks computes nonsense."""

import pytest

from rorqual.train.ranks import RankReport, RankWatch, far_off, not_finite


def reports(losses, stage=0, grad_norms=None):
    return [RankReport(True, stage, loss, norm) for loss, norm in zip(losses, grad_norms or losses, strict=True)]


@pytest.mark.parametrize(
    ("values", "off"),
    [
        ([2.3, 2.4, 2.2], []),
        ([2.3, 9.9, 2.2], [1]),
        ([2.0, 5.9], []),
        ([2.0, 6.1], [1]),
        ([6.1, 2.0], [0]),
        ([2.0, 2.1, 2.2, 0.6], [3]),
        ([1.0, 2.0, 3.0, 4.0, 10.0], []),  # 7 above the median, 4.7 robust deviations
        ([2.0, 2.1, float("nan"), 0.0], []),
        ([0.0, 0.0], []),
    ],
)
def test_what_counts_as_far_off(values, off):
    assert list(far_off(reports(values))) == off
    assert list(far_off(reports([1.0] * len(values), grad_norms=values))) == off


def test_stages_are_not_compared():
    assert not far_off([*reports([1.0, 1.1]), *reports([9.0, 9.1], stage=1)])
    assert list(far_off([*reports([1.0, 1.1]), *reports([9.0, 90.0], stage=1)])) == [3]


def test_what_lasts_is_said_once():
    watch, bad, good = RankWatch(), reports([2.0, 2.1, 9.0]), reports([2.0, 2.1, 2.2])
    assert not watch.new(bad)
    (said,) = watch.new(bad)
    assert said.startswith("rank 2 alone has a loss of 9, where the median of its 3 ranks is 2.1, as in the step")
    assert [len(watch.new(found)) for found in (bad, good, bad)] == [0, 0, 0]


def test_not_finite_losses_come_before_gradients():
    nan = float("nan")
    found = [RankReport(True, 0, 1.0, nan), RankReport(True, 0, 1.0, 1.0)]
    assert not_finite(found) == (0,)
    assert not_finite([*found, RankReport(False, 0, nan, nan)]) == (2,)
