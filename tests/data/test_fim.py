import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.fim import FillInTheMiddle
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.recipe import TokenizerSection


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 2**70))
@settings(deadline=None)
def test_arranged_document_can_be_put_back(tokenizer, text, seed):
    fim = FillInTheMiddle.of(tokenizer, 1.0, seed)
    parts = fim.cut(text)
    assert fim.cut(text) == parts
    tokens = fim.arrange(*(tokenizer.encode(part) for part in parts))
    assert tokens[0] == fim.begin
    hole, end = tokens.index(fim.hole), tokens.index(fim.end)
    assert hole < end
    prefix, suffix, middle = (tokenizer.decode(t) for t in (tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 :]))
    assert prefix + middle + suffix == text


def test_rate_is_met_and_seeds_differ(tokenizer):
    texts = [f"document {i}" for i in range(4000)]
    chosen = []
    for seed in (0, 1):
        fim = FillInTheMiddle.of(tokenizer, 0.1, seed)
        chosen.append({text for text in texts if fim.cut(text) is not None})
        assert 320 < len(chosen[-1]) < 480
    assert chosen[0] != chosen[1]


def test_tokenizer_without_the_tokens():
    plain = train_tokenizer(["some text"], TokenizerSection(vocab_size=260))
    with pytest.raises(UserError, match=r"data\.fim_rate = 0\.1: the tokenizer has no fill-in-the-middle tokens"):
        FillInTheMiddle.of(plain, 0.1, 0)


def test_qwen_names_are_known():
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    qwen = train_tokenizer(["some text"], TokenizerSection(vocab_size=270, special_tokens=names))
    fim = FillInTheMiddle.of(qwen, 0.5, 0)
    assert [fim.begin, fim.hole, fim.end] == qwen.convert_tokens_to_ids(names)
