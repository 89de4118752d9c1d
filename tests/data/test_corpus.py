import gzip
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_documents import make_texts, write_jsonl
from pyarrow import parquet

from rorqual.data import corpus
from rorqual.data.corpus import read_texts
from rorqual.errors import UserError
from rorqual.recipe import Source

TEXTS = make_texts(20)


def read(path, **fields):
    return list(read_texts(Source(path=str(path), **fields)))


def test_every_format_gives_the_same_documents(tmp_path):
    import datasets

    records = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "tiny": saved.select([3])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "saved", "splits"):
        assert read(tmp_path / name, text_field="body") == TEXTS, name
    assert read(tmp_path / "splits", text_field="body", split="tiny") == [TEXTS[3]]


def test_glob_reads_files_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}, {"text": ""}])
    assert read(tmp_path / "*.jsonl") == ["first", "second"]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=8))
@settings(deadline=None, max_examples=50)
def test_text_files_are_cut_without_loss(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TXT_DOCUMENT_BYTES", 10)
        documents = read(path)
    assert "".join(documents) == "\n".join(lines)
    assert all(documents)
    assert all(d.endswith(("\n", "\r")) for d in documents[:-1])


def test_text_files_become_several_documents(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 50_000)
    documents = read(tmp_path / "a.txt")
    assert 5 < len(documents) < 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl, line 3 is not valid JSON"),
        ("[1]", r"a\.jsonl, line 3 holds a list, not a JSON object"),
        ('{"body": "x"}', r"a\.jsonl, line 3 has no field 'text' but \['body'\]"),
        ('{"text": 7}', r"a\.jsonl, line 3: field 'text' holds a int"),
        ('{"text": "\\ud800"}', r"a\.jsonl, line 3: field 'text' holds a lone surrogate"),
    ],
)
def test_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_unreadable_sources(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (tmp_path / "a.csv").write_text("a,b")
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "other.parquet")
    for name, message in [
        ("bad.parquet", "not a readable Parquet"),
        ("latin.txt", "not UTF-8"),
        ("bytes.jsonl", "line 1 is not valid JSON"),
        ("a.csv", "is none of .txt"),
        ("cut.jsonl.gz", "cannot be read"),
        ("other.parquet", "no column 'text'"),
        ("missing.jsonl", "does not exist"),
        ("*.nothing", "does not exist"),
        ("", "is a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_hub_name_that_cannot_be_opened(monkeypatch):
    import datasets

    def refuse(name, split):
        raise ConnectionError(f"no way to {name}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"^dataset someone/nothing cannot be opened \(no way to someone/nothing\);"):
        read("someone/nothing")
    records = [{"text": "from the hub"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(records))
    assert read("someone/something") == ["from the hub"]


def test_missing_split(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "x"}])}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"no split 'train' but \['test'\]"):
        read(tmp_path / "d")
