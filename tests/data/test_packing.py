import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.packing import best_fit, cut_documents, pack, ranges

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@given(LENGTHS, st.integers(3, 20))
@settings(deadline=None)
def test_each_target_is_in_one_segment(lengths, capacity):
    offsets = offsets_of(lengths)
    starts, sizes = cut_documents(offsets, capacity)
    assert sizes.min() >= 2
    assert sizes.max() <= capacity
    targets = ranges(starts + 1, sizes - 1)
    assert sorted(targets) == sorted(set(range(offsets[-1])) - set(offsets[:-1]))
    document = np.searchsorted(offsets, starts, side="right")
    assert (document == np.searchsorted(offsets, starts + sizes - 1, side="right")).all()
    assert len(starts) == sum(max(1, -(-(n - 1) // (capacity - 1))) for n in lengths)


@given(st.lists(st.integers(2, 30), max_size=80), st.integers(30, 64))
@settings(deadline=None)
def test_rows_hold_and_are_well_filled(lengths, capacity):
    lengths = np.array(lengths, np.int64)
    row_of = best_fit(lengths, capacity)
    filled = np.bincount(row_of, weights=lengths)
    assert (filled <= capacity).all()
    assert (filled > 0).all()
    # At most one row is half empty, or two of them would have been one.
    assert (filled <= capacity / 2).sum() <= 1


def test_best_fit_takes_the_fullest_row():
    # 7 and 6 open rows with 3 and 4 to spare of 10; 3 belongs in the first of them.
    assert best_fit(np.array([7, 6, 3, 4]), 10).tolist() == [0, 1, 0, 1]


@given(LENGTHS, st.integers(3, 60), st.booleans())
@settings(deadline=None)
def test_packing_keeps_every_target_and_never_overfills(lengths, capacity, whole):
    offsets = offsets_of(lengths)
    starts, sizes, row_of = pack(offsets, capacity, whole)
    assert sorted(ranges(starts + 1, sizes - 1)) == sorted(set(range(offsets[-1])) - set(offsets[:-1]))
    filled = np.bincount(row_of, weights=sizes)
    assert (filled <= capacity).all()
    assert (filled > 0).all()
    if whole:
        assert len(starts) == len(cut_documents(offsets, capacity)[0])
    else:
        assert (capacity - filled >= max(2, capacity // 16)).sum() <= 1


def test_documents_of_awkward_lengths_waste_little():
    lengths = np.random.default_rng(0).integers(90, 110, 5000)
    wasted = []
    for whole in (True, False):
        _, sizes, row_of = pack(offsets_of(lengths), 257, whole)
        wasted.append(1 - lengths.sum() / (257 * (row_of.max() + 1)))
    assert wasted[0] > 0.2
    assert wasted[1] < 0.06
    assert len(sizes) < 5000 * 1.3  # under a third of the documents are cut


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], np.int64), np.array([], np.int64)).tolist() == []
