"""Orders written out by hand, faults that check() finds, and what every schedule holds on 1 to 8 ranks."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import UserError
from rorqual.plan.schedule import SCHEDULES, Action, Schedule, dualpipe_v, one_f_one_b, zero_bubble


def written(steps) -> str:
    return " ".join("&".join(f"{a.kind}{a.stage}.{a.micro_batch}" for a in step) for step in steps)


def test_orders_of_two_ranks():
    """Worked out by hand from the phases of each schedule."""
    assert [written(steps) for steps in one_f_one_b(2, 3).steps] == [
        "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]
    assert [written(steps) for steps in zero_bubble(2, 3).steps] == [
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
    ]
    assert [written(steps) for steps in dualpipe_v(2, 4).steps] == [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 B3.2 F3.3&B0.1 I3.3 B0.2 W3.3 I0.3 W0.3",
        "F1.0 F2.0 F1.1 F2.1 F1.2&B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 I2.2 B1.2 I2.3 B1.3 W2.2 W2.3",
    ]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_activations_of_the_readme(ranks):
    """DualPipe's README: PP, PP and PP+1, per device; DualPipeV has PP stages on PP/2 devices."""
    stages = 2 * ranks
    assert one_f_one_b(stages, 2 * stages).peak_activations() == tuple(range(stages, 0, -1))
    assert zero_bubble(stages, 2 * stages).peak_activations() == (stages,) * stages
    assert dualpipe_v(ranks, stages).peak_activations() == (stages + 1,) * ranks


def test_activations_of_stages_that_differ():
    assert one_f_one_b(2, 4).peak_activations([3, 5]) == (6, 5)
    assert dualpipe_v(1, 2).peak_activations([3, 5]) == (3 + 5 + 3,)  # F0 F1 F0&B1 F1&B0 …


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_every_schedule_can_be_run(name, ranks, micro_batches):
    if name == "dualpipev" and micro_batches < 2 * ranks - 1:
        with pytest.raises(UserError, match=f"parallel.micro_batches is {micro_batches}, .* at least {2 * ranks - 1};"):
            SCHEDULES[name](ranks, micro_batches)
        return
    schedule = SCHEDULES[name](ranks, micro_batches)
    schedule.check()
    assert (schedule.name, schedule.ranks, schedule.micro_batches) == (name, ranks, micro_batches)
    most = min(schedule.stages + 1, 2 * micro_batches) if name == "dualpipev" else min(ranks, micro_batches)
    assert max(schedule.peak_activations()) == most


def test_the_v_returns_to_the_first_rank():
    assert dualpipe_v(3, 6).rank_of_stage == (0, 1, 2, 2, 1, 0)


def test_no_ranks():
    with pytest.raises(UserError, match="0 ranks"):
        one_f_one_b(0, 4)


def two_ranks(first: str, second: str) -> Schedule:
    """Two micro-batches, one stage a rank, from orders such as "F0 I0 W0 F1&B1"."""

    def steps(stage, order):
        return tuple(tuple(Action(w[0], stage, int(w[1])) for w in words.split("&")) for words in order.split())

    return Schedule("test", 2, 2, 2, (0, 1), (steps(0, first), steps(1, second)))


GOOD = "F0 F1 B0 B1"


def test_check_accepts_a_split_and_an_overlap():
    two_ranks("F0 F1 B0 I1 W1", "F0 F1&B0 I1 W1").check()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (GOOD, "F0 B0 B1", "F of micro-batch 1 at stage 1 is there 0 times"),
        (GOOD, "F0 F1 B0", "I of micro-batch 1 at stage 1 is there 0 times"),
        (GOOD, "F0 F1 B0 I1", "W of micro-batch 1 at stage 1 is there 0 times"),
        ("F0 F1 F1 B0 B1", GOOD, "F of micro-batch 1 at stage 0 is there 2 times"),
        (GOOD, "F0 F1 B0 I0 B1", "I of micro-batch 0 at stage 1 is there 2 times"),
        (GOOD, "F0 F1 B0 B1 W1", "W of micro-batch 1 at stage 1 is there 2 times"),
        ("F0 F1 F2 B0 B1", GOOD, "F of micro-batch 2 at stage 0 is there 1 times instead of 0"),
        (GOOD, "F0 W0 I0 F1 B1", "rank 1 before W of micro-batch 0 at stage 1 for I of"),
        ("F0 B0 F1 B1", "F0 F1 B0 B1", "wait for ever: rank 0 before B of micro-batch 0 at stage 0 for I of"),
        (GOOD, "F1 F0&B0 B1", "rank 1 before B of micro-batch 0 at stage 1 for F of micro-batch 0 at stage 1"),
        (GOOD, "F0 F1&I0 W0 B1", "neither one action nor an overlapped F and B"),
    ],
)
def test_check_finds_faults(first, second, message):
    with pytest.raises(ValueError, match=message):
        two_ranks(first, second).check()


def test_check_finds_a_stage_on_another_rank():
    schedule = two_ranks(GOOD, GOOD)
    with pytest.raises(ValueError, match="is not for rank 0"):
        replace(schedule, steps=schedule.steps[::-1]).check()
    with pytest.raises(ValueError, match="2 ranks and 2 stages"):
        replace(schedule, steps=schedule.steps[:1]).check()
