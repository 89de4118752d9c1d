import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.loader import Batch, Heldout, Loader, PackedDataset, bytes_of_tokens
from rorqual.data.token_shards import Documents
from rorqual.errors import UserError

PAD = 0


def documents_of(lengths, first=1):
    """Documents whose tokens are all different, so that each can be followed through a batch."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(np.arange(first, first + offsets[-1], dtype=np.uint32), offsets)


def rows_of(lengths, length=16, first=1, isolate=False):
    return PackedDataset(documents_of(lengths, first), length, PAD, isolate)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("inputs", "targets", "weights", "positions"))


LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=40)


@given(LENGTHS, st.integers(2, 24), st.booleans(), st.booleans(), st.integers(1, 7))
@settings(deadline=None)
def test_an_epoch_holds_every_token_and_target_once(lengths, length, isolate, whole, size):
    rows = PackedDataset(documents_of(lengths), length, PAD, isolate, whole)
    loader = Loader([rows], [1.0], seed=3)
    batches = [loader.next(min(size, len(rows) - start)) for start in range(0, len(rows), size)]
    assert loader.epoch == 1.0
    pairs = []
    for batch in batches:
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape[1] == length
        real = batch.weights > 0
        pairs += zip(batch.inputs[real].tolist(), batch.targets[real].tolist(), strict=True)
    offsets = rows.documents.offsets
    first = set((offsets[:-1] + 1).tolist())
    assert sorted(pairs) == [(t - 1, t) for t in range(1, int(offsets[-1]) + 1) if t not in first]


@given(LENGTHS, st.integers(0, 2**40), st.lists(st.integers(1, 9), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_resumes_exactly_anywhere(lengths, seed, sizes, data):
    def make():
        return Loader([rows_of(lengths, 12), rows_of([5, 9, 20], 12, first=5000)], [3.0, 1.0], seed)

    stop = data.draw(st.integers(0, len(sizes) - 1))
    undisturbed = make()
    for size in sizes[:stop]:
        undisturbed.next(size)
    state = json.loads(json.dumps(undisturbed.state_dict()))
    expected = [undisturbed.next(size) for size in sizes[stop:]]
    resumed = make()
    resumed.load_state_dict(state)
    assert all(same(resumed.next(size), batch) for size, batch in zip(sizes[stop:], expected, strict=True))
    assert resumed.state_dict() == undisturbed.state_dict()


def test_batch_size_does_not_change_the_order_of_rows():
    def make():
        return Loader([rows_of([10] * 50), rows_of([7] * 30, first=9000)], [2.0, 1.0], 0)

    whole, parts = make(), make()
    expected = whole.next(60).inputs
    assert torch.equal(torch.cat([parts.next(n).inputs for n in (1, 7, 2, 50)]), expected)


def test_epochs_and_seeds_shuffle_differently():
    rows = rows_of([17] * 40)
    first, other = Loader([rows], [1.0], 0), Loader([rows], [1.0], 1)
    one, two, three = (loader.next(40).inputs[:, 0].tolist() for loader in (first, first, other))
    assert sorted(one) == sorted(two) == sorted(three)
    assert len({tuple(one), tuple(two), tuple(three), tuple(sorted(one))}) == 4


@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=5), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_mixture_keeps_its_proportions(weights, count):
    sources = [rows_of([10] * (3 + i), first=1 + 10_000 * i) for i in range(len(weights))]
    loader = Loader(sources, weights, 0)
    inputs = torch.cat([loader.next(n).inputs for n in (1, count)])
    drawn = np.bincount(inputs[:, 0].numpy() // 10_000, minlength=len(weights))
    shares = np.array(weights) / sum(weights)
    assert (np.abs(drawn - shares * (count + 1)) <= len(weights)).all()
    assert loader.drawn.tolist() == drawn.tolist()


def test_state_of_other_data_is_refused():
    state = Loader([rows_of([10] * 9)], [1.0], 0).state_dict()
    for other in (
        Loader([rows_of([10] * 9)], [1.0], 1),
        Loader([rows_of([10] * 8)], [1.0], 0),
        Loader([rows_of([10] * 9, first=2)], [1.0], 0),
        Loader([rows_of([10] * 9, length=15)], [1.0], 0),
        Loader([rows_of([10] * 9, isolate=True)], [1.0], 0),
    ):
        with pytest.raises(UserError, match="made with other data"):
            other.load_state_dict(state)


def test_isolated_row():
    batch = rows_of([4, 3], length=8, isolate=True).batch(np.array([0]))
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5, 6, 7, PAD]]
    assert batch.targets.tolist() == [[2, 3, 4, 5, 6, 7, PAD, PAD]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
    joined = rows_of([4, 3], length=8).batch(np.array([0]))
    assert joined.documents is None
    assert joined.positions.tolist() == [list(range(8))]


@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6).map(sorted), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_mask_is_causal_within_documents(documents):
    tokens = torch.tensor(documents)
    mask = Batch(tokens, tokens, tokens.float(), tokens, documents=tokens).attention_mask
    assert mask.shape == (len(documents), 1, 6, 6)
    for b, row in enumerate(documents):
        for i in range(6):
            for j in range(6):
                assert mask[b, 0, i, j].item() == (j <= i and row[i] == row[j])


def test_target_weights_follow_their_tokens():
    base = documents_of([4, 3])
    marked = Documents(base.tokens, base.offsets, np.array([0, 0, 1, 1, 1, 1, 0], np.uint8))
    batch = PackedDataset(marked, 6, PAD, isolate=True).batch(np.array([0]))
    assert dict(zip(batch.targets[0].tolist(), batch.weights[0].tolist(), strict=True)) == {
        2: 0, 3: 1, 4: 1, 5: 0, 6: 1, 7: 0
    }  # fmt: skip


def test_heldout_covers_all_once_and_counts_bytes():
    rows = rows_of([9, 30, 4, 4, 13])
    table = np.arange(100) % 5
    heldout = Heldout([rows, rows_of([6], first=61)], table)
    assert heldout.rows == len(rows) + 1
    seen, total = [], 0
    for batch, size in heldout.batches(2):
        seen += batch.targets[batch.weights > 0].tolist()
        total += size
    firsts = {1, 10, 40, 44, 48}
    assert sorted(seen) == [t for t in range(1, 61) if t not in firsts] + list(range(62, 67))
    assert total == sum(table[t] for t in seen)
    assert sum(1 for _ in heldout.batches(2, limit=1)) == 1
    assert [b.inputs.tolist() for b, _ in heldout.batches(3)] == [b.inputs.tolist() for b, _ in heldout.batches(3)]


@pytest.mark.parametrize(
    ("rows", "weights", "limit", "expected"),
    [
        ((500, 500), (1, 1), 4, (16, 16)),
        ((500, 500), (3, 1), 4, (24, 8)),
        ((500, 500, 500), (1000, 1, 1), 4, (30, 1, 1)),  # of every source something
        ((3, 500), (1, 1), 4, (16, 16)),  # a small one again from the start
        ((3, 4), (1, 1), 4, (4, 4)),  # but no more than it takes to see all
        ((500, 500), (3, 1), None, (500, 500)),
    ],
)
def test_a_short_validation_is_a_sample_of_the_mixture(rows, weights, limit, expected):
    firsts = np.cumsum([1, *(9 * count for count in rows)])
    sources = [rows_of([9] * count, 8, first) for count, first in zip(rows, firsts, strict=False)]
    heldout = Heldout(sources, np.ones(20_000, np.int64), list(weights))
    batches = [batch.inputs for batch, _ in heldout.batches(8, limit)]
    assert all(len(batch) == 8 for batch in batches[:-1])
    seen = np.digitize(torch.cat(batches)[:, 0].numpy(), firsts) - 1
    assert tuple(np.bincount(seen, minlength=len(rows))) == expected
    if expected == (16, 16):
        assert [np.bincount(part).tolist() for part in seen.reshape(4, 8)] == [[4, 4]] * 4
    again = [batch.inputs for batch, _ in heldout.batches(8, limit)]
    assert all(a.equal(b) for a, b in zip(batches, again, strict=True))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_tokens_spell_their_bytes(tokenizer, text):
    table = bytes_of_tokens(tokenizer)
    assert len(table) == len(tokenizer)
    assert table[tokenizer.eos_token_id] == 0
    text = "<think>" + text.replace("<|", "")
    assert table[tokenizer.encode(text)].sum() == len(text.encode())


def test_sentencepiece_tokens_spell_their_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<0x0A>", "▁whale", "é", "▁"]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    table = bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert table.tolist() == [0, 1, 6, 2, 1]
