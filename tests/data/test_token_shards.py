import errno
import os
import random

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from helpers.documents import make_texts, write_jsonl
from rorqual.data import corpus, token_shards
from rorqual.data.fim import FillInTheMiddle
from rorqual.data.token_shards import pack_source, read_index
from rorqual.errors import UserError
from rorqual.recipe import Source

TEXTS = make_texts(300)


@pytest.fixture
def source(tmp_path):
    return Source(path=str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])))


def parts(documents):
    pairs = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [documents.tokens[start:end].tolist() for start, end in pairs]


def texts_of(documents, tokenizer):
    out = []
    for tokens in parts(documents):
        assert tokens[-1] == tokenizer.eos_token_id
        out.append(tokenizer.decode(tokens[:-1]))
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_no_document_is_lost(source, tokenizer, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(token_shards, "BATCH_CHUNKS", 17)
    packed = pack_source(source, tokenizer, tmp_path / "cache", 0.2, workers=workers)
    train, valid = (texts_of(packed[split], tokenizer) for split in ("train", "valid"))
    assert 30 < len(valid) < 90
    assert [t for t in TEXTS if t in set(train)] == train
    assert sorted(train + valid) == sorted(TEXTS)
    (folder,) = (tmp_path / "cache").iterdir()
    index = read_index(folder)
    assert index["dtype"] == "uint16"
    assert index["train"]["bytes"] == sum(len(t.encode()) for t in train)
    assert index["valid"] == {
        "documents": len(valid),
        "tokens": len(packed["valid"].tokens),
        "bytes": sum(len(t.encode()) for t in valid),
    }


def test_reused_until_something_changes(source, tokenizer, tmp_path, monkeypatch):
    calls = []
    real = token_shards.read_texts
    monkeypatch.setattr(token_shards, "read_texts", lambda s: calls.append(s) or real(s))
    first = pack_source(source, tokenizer, tmp_path / "cache", 0.1)
    again = pack_source(source, tokenizer, tmp_path / "cache", 0.1)
    assert len(calls) == 1
    assert np.array_equal(first["train"].tokens, again["train"].tokens)
    pack_source(source, tokenizer, tmp_path / "cache", 0.3)
    assert len(calls) == 2
    pack_source(source, tokenizer, tmp_path / "cache", 0.1, FillInTheMiddle.of(tokenizer, 0.5, 0))
    assert len(calls) == 3
    write_jsonl(tmp_path / "a.jsonl", [{"text": "other"}])
    assert len(pack_source(source, tokenizer, tmp_path / "cache", 0.1)["train"]) == 1
    assert len(calls) == 4


def test_copies_stay_on_one_side(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3])
    packed = pack_source(Source(path=str(path)), tokenizer, tmp_path, 0.3)
    train, valid = (set(texts_of(packed[split], tokenizer)) for split in ("train", "valid"))
    assert valid
    assert not train & valid


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 1e-9, 1), (5, 0.9999, 4), (5, 0.0, 0)])
def test_both_splits_get_something(tokenizer, tmp_path, count, fraction, held_out):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:count]])
    packed = pack_source(Source(path=str(path)), tokenizer, tmp_path, fraction)
    assert (len(packed["train"]), len(packed["valid"])) == (count - held_out, held_out)
    assert sorted(texts_of(packed["train"], tokenizer) + texts_of(packed["valid"], tokenizer)) == sorted(TEXTS[:count])


WORDS = "a line of several words and numbers such as 12\n"


def held_out_share(packed):
    return len(packed["valid"].tokens) / sum(len(documents.tokens) for documents in packed.values())


@pytest.mark.parametrize("form", ["one line.txt", "no space.txt", "one record.jsonl", "one row.parquet"])
def test_a_share_of_one_long_document_is_held_out(tokenizer, tmp_path, monkeypatch, form):
    monkeypatch.setattr(token_shards, "CHUNK_CHARACTERS", 1 << 10)
    monkeypatch.setattr(corpus, "TXT_DOCUMENT", 1 << 10)
    path, draw = tmp_path / form, random.Random(0)
    text = "".join(draw.choice("abcdefgh" if form == "no space.txt" else "abcde  ") for _ in range(200_000))
    if form.endswith("txt"):
        path.write_text(text)
    elif form.endswith("jsonl"):
        write_jsonl(path, [{"text": text}])
    else:
        parquet.write_table(pyarrow.table({"text": [text]}), path)
    packed = pack_source(Source(path=str(path)), tokenizer, tmp_path / "cache", 0.1, workers=2)
    assert 0.05 < held_out_share(packed) < 0.15
    decoded = {split: [tokenizer.decode(t) for t in parts(documents)] for split, documents in packed.items()}
    assert sum(len(t.replace("<|endoftext|>", "")) for texts in decoded.values() for t in texts) == len(text)
    ends = sum(t.endswith("<|endoftext|>") for texts in decoded.values() for t in texts)
    assert ends == 1 if not form.endswith("txt") else ends > 180
    index = read_index(next((tmp_path / "cache").iterdir()))
    assert index["train"]["bytes"] + index["valid"]["bytes"] == len(text)
    assert all(len(t) > 1000 and t.replace("<|endoftext|>", "") in text for t in decoded["train"])  # joined again


@pytest.mark.parametrize(
    ("sizes", "fraction", "least", "most"),
    [
        ([3000], 0.1, 0.09, 0.11),  # the only document is cut
        ([3000], 0.9, 0.89, 0.91),
        ([1], 0.1, 0.05, 0.6),
        ([10] * 9 + [3000], 0.01, 0.005, 0.02),  # so is a last one that is much longer than the share
        ([40] * 9 + [20], 0.001, 0.01, 0.06),  # a short one is not
        ([30] * 4, 0.1, 0.09, 0.11),
        ([15] * 4, 0.1, 0.2, 0.3),
        ([3000, 10], 0.01, 0.005, 0.02),
        ([2] * 2000, 0.02, 0.01, 0.03),
    ],
)
def test_the_share_holds_by_bytes(tokenizer, tmp_path, sizes, fraction, least, most):
    texts = [f"{i} " + WORDS * size for i, size in enumerate(sizes)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    packed = pack_source(Source(path=str(path)), tokenizer, tmp_path / "cache", fraction)
    assert least <= held_out_share(packed) <= most
    assert all((np.diff(documents.offsets) >= 2).all() for documents in packed.values())


def test_a_source_too_small_to_hold_out_says_so(tokenizer, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    packed = pack_source(Source(path=str(path)), tokenizer, tmp_path / "cache", 0.1)
    assert (len(packed["train"]), len(packed["valid"])) == (1, 0)
    assert "a.jsonl: too small to hold out any of it" in capsys.readouterr().err


def test_long_documents_are_rearranged_piece_by_piece(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "CHUNK_CHARACTERS", 1 << 8)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": WORDS * 500}])
    fim = FillInTheMiddle.of(tokenizer, 1.0, 0)
    train = pack_source(Source(path=str(path)), tokenizer, tmp_path / "cache", 0.0, fim)["train"]
    assert len(train) > 80
    firsts, lasts = train.tokens[train.offsets[:-1]], train.tokens[train.offsets[1:] - 1]
    assert (firsts == fim.begin).all()
    assert (lasts == tokenizer.eos_token_id).all()


def test_fill_in_the_middle_leaves_held_out_documents_alone(source, tokenizer, tmp_path):
    fim = FillInTheMiddle.of(tokenizer, 0.5, 0)
    packed = pack_source(source, tokenizer, tmp_path / "cache", 0.3, fim)
    assert set(texts_of(packed["valid"], tokenizer)) <= set(TEXTS)
    train = packed["train"]
    firsts = train.tokens[train.offsets[:-1]]
    assert 0.35 < (firsts == fim.begin).mean() < 0.65
    rebuilt = []
    for text in texts_of(train, tokenizer):
        if text.startswith("<|fim_begin|>"):
            prefix, rest = text.removeprefix("<|fim_begin|>").split("<|fim_hole|>")
            suffix, middle = rest.split("<|fim_end|>")
            text = prefix + middle + suffix
        rebuilt.append(text)
    assert set(rebuilt) == set(TEXTS) - set(texts_of(packed["valid"], tokenizer))


@pytest.mark.parametrize("content", ["", "\n", '{"text": ""}\n'])
def test_empty_corpus(tokenizer, tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl holds no documents"):
        pack_source(Source(path=str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_broken_line_leaves_nothing_behind(source, tokenizer, tmp_path):
    with open(source.path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match="line 301 is not valid JSON"):
        pack_source(source, tokenizer, tmp_path / "cache", workers=2)
    assert list((tmp_path / "cache").iterdir()) == []
    assert os.environ.get("TOKENIZERS_PARALLELISM") != "false"


def test_full_disk(source, tokenizer, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written .*the disk is full"):
        pack_source(source, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_leavings_of_a_killed_run_are_replaced(source, tokenizer, tmp_path):
    expected = pack_source(source, tokenizer, tmp_path / "cache")["train"].tokens.tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    partial = folder.rename(folder.with_name(".writing-" + folder.name))
    (partial / "train.tokens").write_bytes(b"debris")
    made = pack_source(source, tokenizer, tmp_path / "cache")["train"]
    assert made.tokens.tolist() == expected
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets.npy", "index.json"])
def test_damaged_shard(source, tokenizer, tmp_path, name):
    pack_source(source, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(UserError, match=r"delete .* to have it rebuilt"):
        pack_source(source, tokenizer, tmp_path / "cache")
