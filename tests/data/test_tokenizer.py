import copy
import errno
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.tokenizer import FIM_TOKENS, load_tokenizer, save_tokenizer, token_ids, train_tokenizer
from rorqual.errors import UserError
from rorqual.recipe import TokenizerSection

TEXTS = [
    f"The quick brown fox {i} jumps over {i * 7} lazy dogs;\n\tif x == {i}: return 'ü漢字🐋'\n" for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer():
    section = TokenizerSection(
        vocab_size=1600, whole_numbers=1000, special_tokens=["<think>", "</think>", "<|user|>", "<|assistant|>"]
    )
    return train_tokenizer(iter(TEXTS), section, fim=True)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_tokens_are_those_of_the_tokenizers_own_call(tokenizer):
    from tokenizers.processors import TemplateProcessing

    mine = copy.deepcopy(tokenizer)
    mine.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", mine.convert_tokens_to_ids("<|user|>"))]
    )
    for text in ("", " ", *TEXTS[:3], "<think>", "é🐋" * 50):
        for special in (False, True):
            mine.backend_tokenizer.enable_truncation(3)
            mine.backend_tokenizer.enable_padding(length=400)
            assert token_ids(mine, text, special) == mine(text, add_special_tokens=special).input_ids


@pytest.mark.parametrize("count", [1, 9, 10, 11, 57, 100, 101, 150, 555, 1000])
def test_each_whole_number_is_one_token(count):
    small = train_tokenizer(TEXTS, TokenizerSection(vocab_size=1300, whole_numbers=count))
    for n in range(count):
        assert len(small.encode(str(n))) == 1, n
    assert len({small.encode(str(n))[0] for n in range(count)}) == count
    longer = "0071234567890" if count < 1000 else "1000"
    assert small.decode(small.encode(longer)) == longer
    assert len(small.encode("1000")) > 1


def test_vocabulary_is_as_asked(tokenizer):
    assert len(tokenizer) <= 1600
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(len(tokenizer)))
    for token in ("<think>", "</think>", "<|user|>", *FIM_TOKENS):
        assert tokenizer.encode(f"a{token}b")[1:-1] == [ids[token]]
    assert " brown" in tokenizer.batch_decode([[i] for i in ids.values()])
    thought = tokenizer.encode("<|user|>hi<think>x</think>")
    assert tokenizer.decode(thought, skip_special_tokens=True) == "hi<think>x</think>"


def test_pre_tokenizer_pieces(tokenizer):
    pieces = [p for p, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab cd  12345+-x")]
    assert pieces == ["ab", "Ġcd", "Ġ", "Ġ", "123", "45", "+", "-", "x"]


def test_training_is_deterministic(tokenizer):
    section = TokenizerSection(vocab_size=700)
    first, second = (train_tokenizer(TEXTS, section).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = load_tokenizer(tmp_path)
    text = TEXTS[5] + "<think>12 + 30</think>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|user|>Hi<|assistant|>Yes<|endoftext|>"
    prompt = loaded.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>Hi<|assistant|>"


def test_errors(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json .*cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="vocab_size = 300: must be at least 1247"):
        train_tokenizer(TEXTS, TokenizerSection(vocab_size=300, whole_numbers=1000))
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], TokenizerSection())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_tokenizer(tokenizer, tmp_path)


@pytest.mark.parametrize("longest", [{}, "512", [1], True])
def test_settings_of_another_type_are_named(tokenizer, tmp_path, longest):
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": longest}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: model_max_length = .* must be a number, or null"):
        load_tokenizer(tmp_path)


def test_an_id_that_no_vocabulary_needs(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.json"
    described = json.loads(file.read_text())
    token = next(iter(described["model"]["vocab"]))
    described["model"]["vocab"][token] = 2**31 - 1
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"tokenizer.json .*a token has the id 2147483647"):
        load_tokenizer(tmp_path)
