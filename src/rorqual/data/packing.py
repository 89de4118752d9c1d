"""Best-fit packing of documents into rows of fixed length, with few cuts (Ding et al. 2024; V3 §4.1)."""

from collections import deque

import numpy as np

LARGEST_GAP = 1 / 16  # of a row: maximal padding where documents may be cut


def pack(offsets: np.ndarray, capacity: int, whole: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments of documents (starts, lengths) and the row of each, with at most `capacity` tokens per row.

    offsets [documents + 1]. `whole` accepts the padding of best fit and cuts only documents longer than a row.
    Otherwise rows with gaps above LARGEST_GAP are filled with parts of the emptiest rows' documents: with documents of
    about 100 tokens, rows of 256 would else be a quarter padding.
    """
    starts, lengths = cut_documents(offsets, capacity)
    row_of = best_fit(lengths, capacity)
    return (starts, lengths, row_of) if whole else _fill_gaps(starts, lengths, row_of, capacity)


def cut_documents(offsets: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments (starts, lengths) of documents, each of at most `capacity` tokens.

    Only longer documents are cut, and neighbouring segments share one token, so that every token except a document's
    first is a target exactly once.
    """
    lengths = np.diff(offsets)
    step = capacity - 1
    counts = np.maximum(1, -(-(lengths - 1) // step))
    shift = ranges(np.zeros_like(counts), counts) * step
    starts = np.repeat(offsets[:-1], counts) + shift
    return starts, np.minimum(capacity, np.repeat(lengths, counts) - shift)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each segment by best-fit decreasing: longest first, each into the fullest row that it fits."""
    row_of = np.empty(len(lengths), np.int64)
    whole = lengths == capacity
    rows = int(whole.sum())
    row_of[whole] = np.arange(rows)
    rest = np.flatnonzero(~whole)
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s: some row has exactly s free tokens; the fullest row that fits is the lowest bit after a shift
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
    """Split up the emptiest rows to fill the others; the parts of a cut segment share one token."""
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
        space = int(spare[row])
        kept += [(*segment, row) for segment in contents[row]]
        while space >= least and (supply or waiting):
            if not supply:
                supply = contents[waiting.pop()]
            start, length = supply.pop()
            taken = min(length, space)
            kept.append((start, taken, row))
            space -= taken
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
    """The concatenated ranges `starts[i], …, starts[i] + lengths[i] - 1`."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
