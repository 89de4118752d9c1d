"""Bubbles against the formulas of DualPipe's README, and a timeline worked out by hand."""

import pytest

from rorqual.plan.schedule import SCHEDULES, dualpipe_v, one_f_one_b, zero_bubble
from rorqual.plan.simulate import Times, simulate

# All with W ≤ F ≤ I; FB from no overlap to the longer of the two.
TIMES = [Times(1, 2, 1, 1, 3), Times(2, 4, 2.5, 1.5), Times(2, 4, 2, 2, 5), Times(1, 3.5, 2.75, 0.75, 3.5)]


@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize("times", TIMES, ids=str)
@pytest.mark.parametrize("more", [0, 3, 16])
def test_bubbles_of_the_readme(stages, times, more):
    F, B, W = times.F, times.B, times.W
    FB = F + B if times.FB is None else times.FB
    ranks, micro_batches = stages // 2, stages + more
    assert simulate(one_f_one_b(stages, micro_batches), times).bubble == ((stages - 1) * (F + B),) * stages
    assert simulate(zero_bubble(stages, micro_batches), times).bubble == ((stages - 1) * (F + B - 2 * W),) * stages
    bubble = simulate(dualpipe_v(ranks, micro_batches), times).bubble
    assert bubble[-1] == max(bubble) == (stages / 2 - 1) * (FB + B - 3 * W)
    assert bubble == tuple(bubble[-1] - (ranks - 1 - rank) * (F + B - FB) for rank in range(ranks))


@pytest.mark.parametrize(
    ("schedule", "times", "formula"),
    [
        (zero_bubble(4, 8), Times(1, 4, 2, 2), 3 * 1),  # W > F
        (zero_bubble(4, 8), Times(2, 3, 1, 2), 3 * 1),  # W > I
        (dualpipe_v(4, 8), Times(3, 4, 2, 2), 3 * 5),  # F > I
        (dualpipe_v(4, 8), Times(1, 3, 1, 2), 3 * 1),  # W > I
    ],
)
def test_where_the_formulas_do_not_hold(schedule, times, formula):
    assert max(simulate(schedule, times).bubble) > formula


def test_dualpipe_v_may_have_w_longer_than_f():
    assert simulate(dualpipe_v(4, 8), Times(1, 4, 2, 2)).bubble == (3 * (5 + 4 - 6),) * 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_has_no_bubble(name):
    schedule = SCHEDULES[name](1, 3)
    timeline = simulate(schedule, Times(1, 2, 1, 1, link=5))
    assert timeline.length == schedule.stages * 3 * 3
    assert timeline.bubble == (0,)


def test_links_and_times_of_stages():
    """Two micro-batches: F 1 and 2 s, B 3 and 4 s, half a second of link."""
    timeline = simulate(one_f_one_b(2, 2), Times(F=(1, 2), B=(3, 4), I=1, W=1, link=0.5))
    assert timeline.spans == (((0, 1), (1, 2), (8, 11), (14, 17)), ((1.5, 3.5), (3.5, 7.5), (7.5, 9.5), (9.5, 13.5)))
    assert timeline.length == 17
    assert timeline.bubble == (9, 5)
    assert timeline.bubble_share == 14 / 34


def test_a_pair_takes_the_time_of_its_forwards_stage():
    """One rank: F0 F1, then two pairs, F0&B1 and F1&B0, then I1 B0 W1, each otherwise 1 s."""
    timeline = simulate(dualpipe_v(1, 2), Times(F=1, B=1, I=1, W=1, FB=[10, 20]))
    assert timeline.spans == (((0, 1), (1, 2), (2, 12), (12, 32), (32, 33), (33, 34), (34, 35)),)


def test_too_few_times_are_refused():
    with pytest.raises(ValueError, match="2 stages, and 3 times F"):
        simulate(one_f_one_b(2, 2), Times(F=[1, 1, 1], B=2, I=1, W=1))
