"""Text as it comes: whole characters, stop strings, thoughts apart."""

import random

import pytest

from helpers.scripted_models import BYTE_LEVEL, LEGACY, METASPACE, vocabulary
from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine.detokenizer import IncrementalDetokenizer, StopMatcher, TokenDecoder, leaves_open
from rorqual.recipe import TokenizerSection


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is"], TokenizerSection(vocab_size=300, special_tokens=["<think>", "</think>"]))


def fed(tokenizer, said, stop=(), thinking=False, step=1):
    """The stream after `said`, and whether what it had shown ever had to be taken back."""
    tokens = tokenizer(said).input_ids
    stream = IncrementalDetokenizer(TokenDecoder(tokenizer), stop, "<think>" * thinking)
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
        ("so<think>it</think>is", False, "", "so<think>it</think>is", 0),
        ("a</think>b</think>c", True, "a", "b</think>c", 1),
        ("a<think>b</think>c", True, "a<think>b", "c", 3),
        ("<think>a</think>b", True, "a", "b", 1),
        (" \n<think>a</think>b", False, "a", "b", 1),
        ("\n\nso", False, "", "\n\nso", 0),
        ("</think>\n\nso", True, "", "so", 0),
        ("\n \n", False, "", "\n \n", 0),
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
    stream, shown = IncrementalDetokenizer(TokenDecoder(tokenizer)), ""
    for end in [*range(step, len(tokens), step), len(tokens)]:
        stream.feed(tokens[:end], last=end == len(tokens))
        shown += stream.take().text
        assert "\ufffd" not in shown
        assert said.startswith(shown)
        assert len(tokenizer(shown).input_ids) > end - 4, "no more is held back than a character"
    assert shown == stream.text == said


class Joined(TokenDecoder):
    """A vocabulary with tokens that end one character and begin the next."""

    WORDS = (b"\xf0", b"\x9f", b"\x90", b"\x8b\xf0", b"\x8b", b"x", b"\xd7\x97\xd7", b"\x97\xd7", b"\x97")
    think, hidden = None, ()

    def __init__(self):
        pass

    def bytes(self, token):
        return self.WORDS[token]


@pytest.mark.parametrize("step", range(1, 16))
@pytest.mark.parametrize(
    "tokens", [[0, 1, 2, 3, 1, 2, 3, 1, 2, 4, 5], [6, *[7] * 12, 8, 5], [0, 1, 2, 3, 1, 2, 4] * 3, [6, 7, 5, 6, 7, 8]]
)
def test_tokens_that_end_one_character_and_begin_the_next(tokens, step):
    stream = IncrementalDetokenizer(Joined())
    for end in [*range(step, len(tokens), step), len(tokens)]:
        stream.feed(tokens[:end], last=end == len(tokens))
    assert stream.text == b"".join(Joined.WORDS[t] for t in tokens).decode(errors="replace")


def test_bit_by_bit_is_as_decoded_at_once(tokenizer):
    """Bytes of every kind, most of them no characters; with whatever stands beside them."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 30))]
        stream = IncrementalDetokenizer(TokenDecoder(tokenizer))
        step = rng.randrange(1, 14)
        for end in [*range(step, len(tokens), step), len(tokens)]:
            stream.feed(tokens[:end], last=end == len(tokens))
        assert stream.text == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("step", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("said", "thinking", "stop", "content"),
    [
        ("ab\n\n</think>\n\n42 then", True, ("\n\n",), "42 then"),
        ("a</think>\n\n42 then\n\nmore", True, ("\n\n",), "42 then"),
        ("a</think>42 then", True, ("then", " t"), "42"),
        ("abc", False, ("abc", "b"), "a"),
        ("abcd", False, ("bc", "abc"), ""),
        ("abcd", False, ("abcd", "cd"), ""),
        ("so it is", False, ("is so",), "so it is"),
        ("so é🐋 is", False, ("é🐋",), "so "),
        ("aaab", False, ("aab",), "a"),
        ("abababac", False, ("ababac",), "ab"),
        ("a\n\nb", False, ("\n\n",), "a"),
        ("\n\nb", False, ("\n\n",), ""),
    ],
)
def test_the_stop_string_that_is_complete_first_ends_the_answer(tokenizer, said, thinking, stop, content, step):
    stream = fed(tokenizer, said, stop, thinking, step)
    assert stream.content == content
    whole = said.rpartition("</think>")[2].lstrip("\n") if thinking else said
    assert stream.stopped == (content != whole)


@pytest.mark.parametrize("opening", ["</think>", "<think>\n\n</think>\n"])
def test_line_breaks_before_the_answer_are_no_part_of_it_either_where_thinking_is_left_out(tokenizer, opening):
    stream = IncrementalDetokenizer(TokenDecoder(tokenizer), ("\n\n",), opening)
    stream.feed(tokenizer("\n\nso it\n\nis").input_ids, last=True)
    assert (stream.reasoning, stream.content) == ("", "so it")


def test_a_search_finds_what_find_finds():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(30))
        wanted = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 8)))
        search, at, found = StopMatcher(wanted), 0, None
        while found is None and at < len(text):
            piece = text[at : at + rng.randrange(1, 5)]
            end = search.feed(piece)
            found = None if end is None else at + end - len(wanted)
            at += len(piece)
        assert (-1 if found is None else found) == text.find(wanted)


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("said", "thinking", "reasoning", "content"),
    [
        ("<think>so it</think>\nis", False, "so it", "is"),
        ("so it</think>is", True, "so it", "is"),
        ("so </thin it", True, "so </thin it", ""),
        ("<thin it", False, "", "<thin it"),
        ("<th", False, "", "<th"),
        (" \n<think>so", False, "so", ""),
        ("so <think>it</think>", False, "", "so <think>it</think>"),
    ],
)
def test_without_tokens_for_the_marks_the_text_tells(said, thinking, reasoning, content, step):
    bare = vocabulary(BYTE_LEVEL)
    tokens, stream = bare(said).input_ids, IncrementalDetokenizer(TokenDecoder(bare), (), "<think>" * thinking)
    for end in [*range(step, len(tokens), step), len(tokens)]:
        stream.feed(tokens[:end], last=end == len(tokens))
    assert (stream.reasoning, stream.content, stream.text) == (reasoning, content, said)


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ()])
@pytest.mark.parametrize(
    ("prompt", "opening", "open_"),
    [
        ("a<say><think>", "<think>", True),
        ("a<say><think>\n", "<think>\n", True),
        ("a<say><think>\n\n</think>\n\n", "<think>\n\n</think>\n\n", False),
        ("a<say></think>", "</think>", False),
        ("a<say>", "", False),
        ("<think>cut off<turn>a<say>", "", False),
        ("<think>so</think>b<turn>a<say>", "", False),
        ("a <think> b </think> c", "", False),
        ("", "", False),
    ],
)
def test_what_a_prompt_has_opened(marks, prompt, opening, open_):
    tokenizer = vocabulary(BYTE_LEVEL, words=marks)
    found = TokenDecoder(tokenizer).opening(tokenizer(prompt).input_ids)
    assert (found, leaves_open(found)) == (opening, open_)


def test_a_mark_spelt_in_letters_opens_nothing_where_tokens_do():
    tokenizer = vocabulary(BYTE_LEVEL, words=("<think>", "</think>"))
    spelt = vocabulary(BYTE_LEVEL)("a<say>b <think>").input_ids
    assert TokenDecoder(tokenizer).opening(spelt) == ""


@pytest.mark.parametrize("kind", [LEGACY, METASPACE])
def test_sentencepiece_keeps_the_first_space_and_joins_bytes(kind):
    tokenizer = vocabulary(kind, words=("<think>", "</think>"))
    names = ["▁a", "<0xC3>", "<0xA9>", "<turn>", "▁", "b", "<0xF0>", "x", "<end>"]
    tokens, shown = tokenizer.convert_tokens_to_ids(names), []
    stream = IncrementalDetokenizer(TokenDecoder(tokenizer, [tokens[-1]]))
    for end in range(1, len(tokens) + 1):
        stream.feed(tokens[:end], last=end == len(tokens))
        shown.append(stream.take().text)
    assert shown == [" a", "", "é", "", " ", "b", "", "�x", ""]
    assert TokenDecoder(tokenizer, [tokens[-1]]).decode(tokens) == stream.text == " aé b�x"


def test_special_tokens_are_hidden_but_for_what_readers_need():
    tokenizer = vocabulary(
        BYTE_LEVEL, control=("<think>", "</think>", "<｜tool▁calls▁begin｜>", "<|x|>"), words=("<y>",)
    )
    tokens = tokenizer("a<turn>b<|x|><｜tool▁calls▁begin｜><y><think>").input_ids
    assert TokenDecoder(tokenizer).decode(tokens) == "ab<｜tool▁calls▁begin｜><y><think>"
