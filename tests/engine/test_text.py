"""Text as it comes: whole characters, stop strings, thoughts apart."""

import random

import pytest

from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine.text import Speller, TextStream
from rorqual.recipe import TokenizerSection


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is"], TokenizerSection(vocab_size=300, special_tokens=["<think>", "</think>"]))


def fed(tokenizer, said, stop=(), thinking=False, step=1):
    """The stream after `said`, and whether what it had shown ever had to be taken back."""
    tokens = tokenizer(said).input_ids
    vocabulary = tokenizer.get_vocab()
    stream = TextStream(Speller(tokenizer), stop, (vocabulary["<think>"], vocabulary["</think>"]), thinking)
    for end in [*range(step, len(tokens), step), len(tokens)]:
        before = stream.reasoning, stream.content
        stream.feed(tokens[:end], last=end == len(tokens))
        assert stream.reasoning.startswith(before[0])
        assert stream.content.startswith(before[1])
    return stream


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("said", "thinking", "reasoning", "content", "count"),
    [
        ("so it is 🐋", False, "", "so it is 🐋", 0),
        ("ab 🐋</think>\n\nso", True, "ab 🐋", "so", 7),
        ("<think>\nab</think>so", False, "ab", "so", 3),
        ("<think>ab", False, "ab", "", 2),
        ("ab", True, "ab", "", 2),
        ("</think>so", True, "", "so", 0),
        ("so</think>it", False, "", "so</think>it", 0),
    ],
)
def test_thoughts_are_told_apart_by_their_tokens(tokenizer, said, thinking, reasoning, content, count, step):
    stream = fed(tokenizer, said, thinking=thinking, step=step)
    assert (stream.reasoning, stream.content) == (reasoning, content)
    if count != 7:  # how many tokens " 🐋" takes is the tokenizer's affair
        assert stream.reasoning_tokens == count
    assert stream.text == said


def test_a_stop_string_counts_after_the_thoughts_only(tokenizer):
    stream = fed(tokenizer, "a;b</think>c;d", stop=(";",), thinking=True)
    assert (stream.reasoning, stream.content, stream.stopped) == ("a;b", "c", True)
    assert fed(tokenizer, "a;b", stop=(";",)).text == "a"


@pytest.mark.parametrize("step", range(1, 16))
def test_characters_come_whole_however_many_tokens_at_a_time(tokenizer, step):
    said = "so it 🐋🐋 is 鯨鯨鯨 ✗ it 🐋 so"
    tokens = tokenizer(said).input_ids
    stream, shown = TextStream(Speller(tokenizer), ()), ""
    for end in [*range(step, len(tokens), step), len(tokens)]:
        shown += stream.feed(tokens[:end], last=end == len(tokens))
        assert "\ufffd" not in shown
        assert said.startswith(shown)
        assert len(tokenizer(shown).input_ids) > end - 4, "no more is held back than a character"
    assert shown == stream.text == said


class Joined:
    """A vocabulary with tokens that end one character and begin the next."""

    WORDS = (b"\xf0", b"\x9f", b"\x90", b"\x8b\xf0", b"\x8b", b"x", b"\xd7\x97\xd7", b"\x97\xd7", b"\x97")

    def decode(self, tokens):
        return b"".join(self.WORDS[t] for t in tokens).decode(errors="replace")

    def alone(self, token):
        return None


@pytest.mark.parametrize("step", range(1, 16))
@pytest.mark.parametrize(
    "tokens", [[0, 1, 2, 3, 1, 2, 3, 1, 2, 4, 5], [6, *[7] * 12, 8, 5], [0, 1, 2, 3, 1, 2, 4] * 3, [6, 7, 5, 6, 7, 8]]
)
def test_tokens_that_end_one_character_and_begin_the_next(tokens, step):
    stream = TextStream(Joined(), ())
    for end in [*range(step, len(tokens), step), len(tokens)]:
        stream.feed(tokens[:end], last=end == len(tokens))
    assert stream.text == Joined().decode(tokens)


def test_bit_by_bit_is_as_decoded_at_once(tokenizer):
    """Bytes of every kind, most of them no characters; with whatever stands beside them."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 30))]
        stream = TextStream(Speller(tokenizer), ())
        step = rng.randrange(1, 14)
        for end in [*range(step, len(tokens), step), len(tokens)]:
            stream.feed(tokens[:end], last=end == len(tokens))
        assert stream.text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
