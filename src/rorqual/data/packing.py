"""Packing documents into rows of fixed length with few of them cut (Ding et al. 2024; V3 §4.1)."""

from collections import deque

import numpy as np

LARGEST_GAP = 1 / 16  # of a row: the most left empty where documents may be cut


def pack(offsets: np.ndarray, capacity: int, whole: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments of documents (starts, lengths) and the row of each, rows holding at most `capacity` tokens.

    `whole` leaves rows with whatever room best fit leaves them and cuts documents only where they exceed a row.
    Otherwise rows with larger gaps are filled up with pieces of the documents of the emptiest rows: documents of
    about 100 tokens would else leave a quarter of rows of 256 unused.
    """
    starts, lengths = cut_documents(offsets, capacity)
    row_of = best_fit(lengths, capacity)
    return (starts, lengths, row_of) if whole else _fill_gaps(starts, lengths, row_of, capacity)


def cut_documents(offsets: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments (starts, lengths) of documents, each of at most `capacity` tokens.

    Only documents longer than that are cut, and neighbouring segments share one token, so that every token but a
    document's first is the target of the one before it exactly once.
    """
    lengths = np.diff(offsets)
    step = capacity - 1
    counts = np.maximum(1, -(-(lengths - 1) // step))
    shift = ranges(np.zeros_like(counts), counts) * step
    starts = np.repeat(offsets[:-1], counts) + shift
    return starts, np.minimum(capacity, np.repeat(lengths, counts) - shift)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each segment: longest first, each into the fullest row that has room (best-fit decreasing)."""
    row_of = np.empty(len(lengths), np.int64)
    whole = lengths == capacity
    rows = int(whole.sum())
    row_of[whole] = np.arange(rows)
    rest = np.flatnonzero(~whole)
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set while some row has exactly s tokens of room: the fullest that fits is one shift away
    for segment, length in zip(rest.tolist(), lengths[rest].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            row, space, rows = rows, capacity, rows + 1
        row_of[segment] = row
        with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return row_of


def _fill_gaps(
    starts: np.ndarray, lengths: np.ndarray, row_of: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the emptiest rows apart to fill the others; the pieces of a cut segment share one token."""
    least = max(2, int(capacity * LARGEST_GAP))
    spare = capacity - np.bincount(row_of, weights=lengths).astype(np.int64)
    gaps = np.flatnonzero(spare >= least)
    if len(gaps) < 2:
        return starts, lengths, row_of
    with_gap = spare[row_of] >= least
    contents: dict[int, list[tuple[int, int]]] = {row: [] for row in gaps.tolist()}
    for row, *segment in zip(*(a[with_gap].tolist() for a in (row_of, starts, lengths)), strict=True):
        contents[row].append(tuple(segment))
    waiting = deque(gaps[np.argsort(spare[gaps], kind="stable")].tolist())  # fullest first
    kept: list[tuple[int, int, int]] = []  # start, length, row
    supply: list[tuple[int, int]] = []
    while waiting:
        row = waiting.popleft()
        room = int(spare[row])
        kept += [(*segment, row) for segment in contents[row]]
        while room >= least and (supply or waiting):
            if not supply:
                supply = contents[waiting.pop()]
            start, length = supply.pop()
            taken = min(length, room)
            kept.append((start, taken, row))
            room -= taken
            if taken < length:
                supply.append((start + taken - 1, length - taken + 1))
    if supply:
        last = int(row_of.max()) + 1
        kept += [(*segment, last) for segment in supply]
    more = np.array(kept, np.int64).T
    starts, lengths, row_of = (
        np.concatenate([a[~with_gap], b]) for a, b in zip((starts, lengths, row_of), more, strict=True)
    )
    return starts, lengths, np.unique(row_of, return_inverse=True)[1]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`starts[i], …, starts[i] + lengths[i] - 1` for every i, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
