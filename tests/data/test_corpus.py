import codecs
import gzip
import json
import random

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from helpers.documents import make_texts, write_jsonl
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
        patch.setattr(corpus, "TXT_DOCUMENT", 10)
        documents = read(path)
    assert "".join(documents) == "\n".join(lines)
    assert all(5 <= len(d) <= 15 for d in documents[:-1])


@pytest.mark.parametrize("unit", ["line\n", "line\r\n", "line\r", "words and ", "漢字"])
def test_text_files_become_several_documents(tmp_path, unit):
    (tmp_path / "a.txt").write_bytes((unit * 50_000).encode())
    documents = read(tmp_path / "a.txt")
    assert "".join(documents) == unit * 50_000
    assert all(1 << 14 <= len(d) <= 1 << 15 for d in documents[:-1])
    assert unit == "漢字" or all(d.startswith((unit, " and", " words")) for d in documents)


JSONL = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("a.jsonl", JSONL.replace(b"\n", b"\r")),
        ("a.jsonl", codecs.BOM_UTF8 + JSONL),
        ("a.jsonl", JSONL.rstrip()),
        ("a.jsonl", JSONL + b'\n{"text": null}\n{"text": ""}\n'),
        ("a.jsonl", gzip.compress(JSONL, mtime=0)),
        ("A.JSONL.GZ", gzip.compress(JSONL[:16], mtime=0) + gzip.compress(JSONL[16:], mtime=0)),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0) + b"\0" * 100),
        ("with [brackets] in/a[1].jsonl", JSONL),
    ],
)
def test_files_as_they_come(tmp_path, name, raw):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    assert read(path) == ["one", "two"]
    pattern = path.with_name("*" + path.suffix)  # whose folder may have brackets in its name
    assert read(pattern) == ["one", "two"]
    assert read(path.with_name(path.name[:-1] + "?")) == ["one", "two"]


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfone\ntwo", b"one\ntwo"])
def test_a_byte_order_mark_is_no_text(tmp_path, raw):
    (tmp_path / "A.TXT").write_bytes(raw)
    assert read(tmp_path / "A.TXT") == ["one\ntwo"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl, line 3 is not valid JSON"),
        ("[1]", r"a\.jsonl, line 3 holds a list, not a JSON object"),
        ('{"body": "x"}', r"a\.jsonl, line 3 has no field 'text' but \['body'\]"),
        ('{"text": 7}', r"a\.jsonl, line 3: field 'text' holds a int"),
        ('{"text": "\\ud800"}', r"a\.jsonl, line 3: field 'text' contains a lone surrogate"),
        ('{"text": "cut', r"a\.jsonl, line 3 is not valid JSON"),
        ("\0\0\0", r"a\.jsonl, line 3 is not valid JSON"),
        ('{"text": ' + "[" * 100_000, r"a\.jsonl, line 3 is not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", r"a\.jsonl, line 3 is not valid JSON"),
    ],
)
def test_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_unreadable_sources(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes("a\nb\né".encode("latin-1"))
    (tmp_path / "far.txt").write_bytes(b"line\n" * 20_000 + b"\xff\n")
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "wide.jsonl").write_bytes(JSONL.decode().encode("utf-16"))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "plain.jsonl.gz").write_bytes(JSONL)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(JSONL, mtime=0) + b"more")
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode(), mtime=0)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "sum.jsonl.gz").write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    rows = [{"body": "x", "number": 1, "list": ["x"], "bytes": b"x", "nested": {"text": "x"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "other.parquet")
    text = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xff")
    )
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "bytes.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in [
        ("bad.parquet", "not a readable Parquet"),
        ("bytes.parquet", "not a readable Parquet"),
        ("latin.txt", r"latin\.txt, line 3 is not UTF-8"),
        ("far.txt", r"far\.txt, line 20001 is not UTF-8"),
        ("wide.txt", r"wide\.txt, line 1 is not UTF-8"),
        ("cut.txt", r"cut\.txt, line 1 is not UTF-8"),
        ("wide.jsonl", r"wide\.jsonl, line 1 is not UTF-8"),
        ("bytes.jsonl", r"bytes\.jsonl, line 1 is not UTF-8"),
        ("a.csv", "is none of .txt, .md"),
        ("plain.jsonl.gz", "cannot be read as gzip"),
        ("more.jsonl.gz", "cannot be read as gzip"),
        ("cut.jsonl.gz", "cannot be read as gzip"),
        ("sum.jsonl.gz", "cannot be read as gzip"),
        ("other.parquet", "no column 'text'"),
        ("missing.jsonl", "does not exist"),
        ("*.nothing", "does not exist"),
        ("a" * 300 + ".txt", "File name too long"),
        ("folder.jsonl", "is a directory"),
        ("", "is a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    for field, kind in (("number", "int"), ("list", "list"), ("bytes", "bytes"), ("nested", "dict")):
        with pytest.raises(UserError, match=rf"other\.parquet, row 1: field '{field}' holds a {kind}, not text"):
            read(tmp_path / "other.parquet", text_field=field)


def test_a_gzip_file_damaged_anywhere(tmp_path):
    draw = random.Random(1)
    lines = [json.dumps({"text": "".join(draw.choice("abcdefghij ") for _ in range(200))}) for _ in range(100)]
    whole, path = gzip.compress("\n".join(lines).encode(), mtime=0), tmp_path / "a.jsonl.gz"
    for place in range(20, len(whole) - 20, len(whole) // 25):
        path.write_bytes(whole[:place] + bytes(b ^ 0xFF for b in whole[place : place + 8]) + whole[place + 8 :])
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read as gzip"):
            read(path)


def test_nulls_in_a_column_are_left_out(tmp_path):
    table = pyarrow.table({"text": ["one", None, "two"], "none": pyarrow.nulls(3)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["one", "two"]
    assert read(tmp_path / "a.parquet", text_field="none") == []


def test_a_damaged_dataset(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(UserError, match=r"dataset .*saved cannot be"):
        read(tmp_path / "saved")


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
