import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.evals.stats import canonical, cons_at_k, interval, paired_difference, pass_at_1, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_hit(row, data):
    k = data.draw(st.integers(1, len(row)))
    draws = list(itertools.combinations(row, k))
    assert pass_at_k(np.array([row]), k)[0] == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_pass_at_k_equals_the_papers_formula_for_many_samples():
    correct = np.zeros((1, 200), dtype=bool)
    correct[0, :13] = True
    assert pass_at_k(correct, 100)[0] == pytest.approx(1 - math.comb(187, 100) / math.comb(200, 100))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_impossible_k(k):
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        pass_at_k(np.ones((2, 4)), k)


def test_pass_at_1_is_the_mean_over_samples():
    assert pass_at_1([[True, False, False, False], [True, True, True, True]]).tolist() == [0.25, 1.0]


def test_majority_wins_over_pass_at_1():
    assert cons_at_k([["7", "7", "3"]], [[True, True, False]]).tolist() == [1.0]
    assert cons_at_k([["7", "3", "3"]], [[True, False, False]]).tolist() == [0.0]


def test_missing_answers_do_not_vote():
    assert cons_at_k([["7", None, None, None]], [[True, False, False, False]]).tolist() == [1.0]
    assert cons_at_k([[None, None]], [[False, False]]).tolist() == [0.0]


def test_ties_count_as_a_fair_draw_whatever_the_order():
    for order in itertools.permutations([("7", True), ("3", False), ("5", False)]):
        answers, correct = zip(*order, strict=True)
        assert cons_at_k([answers], [correct])[0] == pytest.approx(1 / 3)


def test_same_answers_in_other_spelling_vote_together():
    answers = [["3 + 4*2", "2*4+3", "(4*2) + 3", "12", "12.0"]]
    assert cons_at_k(answers, [[True, True, True, False, False]]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234.0"),
        ("a - b", "A  -  b"),
        ("5-(3-2)", "2 + 5 - 3"),
        ("6/3*2", "2*6 / 3"),
        ("$42$", "42"),
        ("3 × 4", "4*3"),
        ("-5", "- 5"),
        ("-(2-3)", "3-2"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "½"),
        ("1,000 eggs", "1e3"),
    ],
)
def test_canonical_joins(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), [("5-3", "3-5"), ("6/3", "3/6"), ("2*(3+4)", "2*3+4"), ("12", "1 2"),
                                            ("3-(2+1)", "3-2+1"), ("2-1-1", "2-1*1")])  # fmt: skip
def test_canonical_keeps_apart(one, other):
    assert canonical(one) != canonical(other)


@given(st.text(alphabet="0123456789+-*/(). ", max_size=40))
def test_canonical_takes_anything_and_is_stable(text):
    assert canonical(text) == canonical(f"  {text} ")


def test_canonical_survives_deep_nesting_and_powers():
    assert canonical("(" * 100 + "1" + ")" * 99).startswith("(")
    assert canonical("9**9**9**9") == "9**9**9**9"


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = interval(rng.random(100) < 0.3, seed=trial, resamples=400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


def test_interval_is_seeded_and_narrows_with_problems():
    values = np.random.default_rng(0).random(400)
    assert interval(values, seed=3) == interval(values, seed=3)
    wide, narrow = interval(values[:50]), interval(values)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2
    with pytest.raises(ValueError, match="at least one problem"):
        interval(np.array([]))


def test_pairing_cancels_the_problems_own_difficulty():
    difficulty = np.random.default_rng(0).random(300)
    gain, low, high = paired_difference(difficulty, difficulty + 0.01)
    assert gain == pytest.approx(0.01)
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(np.ones(3), np.ones(4))
