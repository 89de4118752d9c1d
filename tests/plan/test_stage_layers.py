"""Splits worked out by hand, and against all splits there are."""

from dataclasses import replace
from itertools import combinations, combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_configs import LATENT
from rorqual.errors import UserError
from rorqual.plan.schedule import SCHEDULES
from rorqual.plan.stage_layers import SLACK, layers_of_stages, split, split_v


def test_splits_by_hand():
    assert split([1] * 8, 4) == (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert split([1] * 9, 4) == (range(2), range(2, 4), range(4, 6), range(6, 9))  # the last holds the fewest
    assert split([1] * 8, 4, after=3) == (range(2), range(2, 4), range(4, 7), range(7, 8))
    assert split([5, 1, 1, 1, 1, 1], 2) == (range(1), range(1, 6))
    assert split([1, 1, 1], 3, after=100) == (range(1), range(1, 2), range(2, 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_no_split_has_a_cheaper_worst_stage(costs, stages, after):
    stages = min(stages, len(costs))

    def spent(cuts):
        edges = [0, *cuts, len(costs)]
        found = [sum(costs[a:b]) for a, b in pairwise(edges)]
        return sorted([*found[:-1], found[-1] + after], reverse=True)

    found = split(costs, stages, after)
    assert [i for part in found for i in part] == list(range(len(costs)))
    best = min(spent(cuts) for cuts in combinations(range(1, len(costs)), stages - 1))
    assert spent([part.start for part in found[1:]]) == best


def test_the_two_ends_of_a_v_share_a_rank():
    assert split_v((1,) * 8, 2) == (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert split_v((1,) * 8, 2, after=3) == split((1,) * 8, 4, after=3)  # 6 and 5 for the ranks
    assert split_v((1,) * 8, 2, after=6) == (range(1), range(1, 4), range(4, 8), range(8, 8))  # 7 and 7, not 9 and 5
    # 61 layers on 16 ranks, with what follows them as much as 4.3: 5 layers on a rank, 4 on 14, none on the first.
    found = split_v((10,) * 61, 16, after=43)
    assert sorted(len(found[rank]) + len(found[-1 - rank]) for rank in range(16)) == [0, *[4] * 14, 5]


@given(st.lists(st.integers(1, 9), min_size=4, max_size=9), st.sampled_from([1, 2]), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_no_v_has_a_cheaper_worst_rank(costs, ranks, after):
    def spent(cuts):
        edges = [0, *cuts, len(costs)]
        found = [sum(costs[a:b]) for a, b in pairwise(edges)]
        found[-1] += after
        return max(found[rank] + found[-1 - rank] for rank in range(ranks))

    found = split_v(tuple(costs), ranks, after)
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert all(found[1:-1])
    every = combinations_with_replacement(range(len(costs) + 1), 2 * ranks - 1)
    best = min(spent(cuts) for cuts in every if all(a < b for a, b in pairwise(cuts)))
    assert spent([part.start for part in found[1:]]) <= SLACK * best


def test_the_head_counts():
    """A head as large as three layers leaves fewer layers to the last stage."""
    config = replace(LATENT, num_hidden_layers=8, first_k_dense_replace=8, vocab_size=3 * 300)
    layers = layers_of_stages(config, SCHEDULES["1f1b"](2, 4))
    assert len(layers[0]) > len(layers[1])


def test_too_few_layers():
    with pytest.raises(UserError, match=r"parallel.pipeline = 2: .*dualpipev needs 4 stages .* 3 layers; .* 1f1b$"):
        layers_of_stages(LATENT, SCHEDULES["dualpipev"](2, 4))
