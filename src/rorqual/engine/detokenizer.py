"""Incremental detokenization: whole characters, stop strings, and thinking split from the answer."""

import builtins
import codecs
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rorqual.data.special_tokens import FRAMED, THINK, is_special
from rorqual.tokenizer_protocol import Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # one byte, in SentencePiece's vocabularies
PROMPT_TAIL = 64  # last tokens of a prompt searched for <think> where the vocabulary has no such token
OPEN = re.compile(r"<think>\s*\Z")
SHUT = re.compile(r"(?:<think>\s*)?</think>\s*\Z")


class TokenDecoder:
    """The bytes of single tokens, shared by all streams.

    `hidden`: tokens that are never part of a text: `ends` and special tokens, except marks that a model writes in its
    own turn. `think`: the tokens that open and close thinking; None for a vocabulary that has none.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int] = ()) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = getattr(tokenizer, "added_tokens_decoder", {})
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()}
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", None))
        self._byte_level, self._sentencepiece = "ByteLevel" in decoder, "▁" in decoder or "ByteFallback" in decoder
        self._cache: dict[int, bytes] = {}
        self.think = thinking_tokens(tokenizer)
        self._boundaries = {*ends, *(n for n, t in self._added.items() if t.special or FRAMED.fullmatch(t.content))}
        self._boundaries -= set(self.think or ())
        self.hidden = {*ends, *(n for n, t in self._added.items() if is_special(t.content, t.special))}
        self.hidden -= set(self.think or ())

    def bytes(self, token: int) -> builtins.bytes:
        """A token's UTF-8 bytes, which may be part of a character; of hidden tokens their names."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._token_bytes(token)
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens that follow others: SentencePiece's leading space is kept."""
        return b"".join(self.bytes(t) for t in tokens if t not in self.hidden).decode(errors="replace")

    def opening(self, prompt: Sequence[int]) -> str:
        """The end of a prompt that belongs to the answer: <think> and what follows it, or an empty <think></think>,
        which skips thinking; else "". Marks of earlier turns do not count.
        """
        if self.think is None:
            tail = self.decode(prompt[-PROMPT_TAIL:])
            found = OPEN.search(tail) or SHUT.search(tail)
            return found[0] if found else ""
        opens, closes = self.think
        begin = closed = None
        for at in range(len(prompt) - 1, -1, -1):
            token = prompt[at]
            if token == opens:
                begin = at
            elif token == closes and closed is None:
                closed = at
            if begin is not None or token in self._boundaries:
                break
        if closed is None:
            return "" if begin is None else self.decode(prompt[begin:])
        text = self.decode(prompt[closed if begin is None else begin :])
        return text if SHUT.fullmatch(text) else ""

    def _token_bytes(self, token: int) -> builtins.bytes:
        if token in self._added:
            return self._added[token].content.encode()
        if self._byte_level:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            if all(char in self._bytes for char in piece):
                return bytes(self._bytes[char] for char in piece)
            return str(piece).encode()
        if self._sentencepiece:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            byte = BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        return self._tokenizer.decode([token]).encode()


def thinking_tokens(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens that open and close thinking; None for a model that has none."""
    vocabulary = tokenizer.get_vocab()
    start, end = (vocabulary.get(name) for name in THINK)
    return None if start is None or end is None else (start, end)


def leaves_open(opening: str) -> bool:
    """Whether a prompt with this `TokenDecoder.opening` leaves thinking open."""
    return bool(opening) and not SHUT.fullmatch(opening)


class StopMatcher:
    """Searches a string in a text that comes in pieces (Knuth, Morris and Pratt 1977).

    Time per character is constant. `at`: how many of the string's first characters match the end of the text.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._borders = [0]  # failure function, computed as far as needed

    def feed(self, piece: str) -> int | None:
        """The index in the piece at which the string ends; None where it is not complete."""
        text, at, i = self.text, self.at, 0
        while True:
            if at == 0:
                i = piece.find(text[0], i)
                if i < 0:
                    break
            elif i == len(piece):
                break
            elif piece[i] != text[at]:
                at = self._border(at)
                continue
            at, i = at + 1, i + 1
            if at == len(text):
                self.at = at
                return i
        self.at = at
        return None

    def _border(self, length: int) -> int:
        text, borders = self.text, self._borders
        while len(borders) < length:
            at, char = borders[-1], text[len(borders)]
            while at and text[at] != char:
                at = borders[at - 1]
            borders.append(at + (text[at] == char))
        return borders[length - 1]


class NewText(NamedTuple):
    """Text that has become final, and its parts."""

    text: str
    reasoning: str
    content: str


class IncrementalDetokenizer:
    """`feed` takes all tokens of a sequence so far; `take` returns the text that has become final since the last call.

    `text` is the text so far; `reasoning` and `content` are its thinking and answer, each without leading line breaks.
    `stopped`: a stop string was found, before which the text ends; of several the one that is complete first. They are
    searched in the answer only: what ends an answer, say an empty line, is common in thinking. `opening`: what the
    prompt has of the answer (`TokenDecoder.opening`). `reasoning_end`: number of tokens up to the end of the thinking.
    """

    def __init__(self, decoder: TokenDecoder, stop: tuple[str, ...] = (), opening: str = "") -> None:
        self._decoder, self._think = decoder, decoder.think or (-1, -1)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._firsts = [StopMatcher(s) for s in stop], {s[0] for s in stop}
        self._num_read = 0  # tokens
        self.text = self.reasoning = self.content = ""
        self.stopped, self.thinking = False, leaves_open(opening)
        self.reasoning_tokens = self.reasoning_end = 0
        self._started = self.thinking  # whether the answer, or its thinking, has started
        self._trim = bool(opening)  # line breaks here belong neither to thinking nor to the answer
        self._leading = ""  # white space before a <think> that may follow
        self._held = ""  # text that may be the beginning of a stop string or mark
        self._close_matcher = StopMatcher(THINK[1]) if decoder.think is None else None
        self._taken = 0, 0, 0  # characters of text, reasoning and content

    def take(self) -> NewText:
        """What has become final since the last call."""
        text, reasoning, content = self._taken
        self._taken = len(self.text), len(self.reasoning), len(self.content)
        return NewText(self.text[text:], self.reasoning[reasoning:], self.content[content:])

    def feed(self, tokens: list[int], last: bool = False) -> None:
        """last: no more tokens follow, so held text is released."""
        if self.stopped:
            return
        decoder = self._decoder
        for token in tokens[self._num_read :]:
            self._num_read += 1
            if token in self._think and self._handle_mark(token):
                continue
            if self.thinking:
                self.reasoning_tokens += 1
                self.reasoning_end = self._num_read
            if token in decoder.hidden:
                continue
            if piece := self._utf8.decode(decoder.bytes(token)):
                self._add_text(piece)
                if self.stopped:
                    break
        if last and not self.stopped:
            self._add_text(self._utf8.decode(b"", True), last=True)

    def _handle_mark(self, token: int) -> bool:
        """Handle a token that opens or closes thinking; False where it is plain text."""
        if token == self._think[0]:
            if self._started and (self.text or not self.thinking):
                return False
        elif not self.thinking:
            return False
        if rest := self._utf8.decode(b"", True):
            self._add_text(rest)
        self._switch(token == self._think[0])
        self.reasoning_end = self._num_read - (token == self._think[1])
        return True

    def _switch(self, opens: bool) -> None:
        self.text += self._leading + THINK[not opens]
        self._leading, self.thinking, self._started, self._trim = "", opens, True, True

    def _add_text(self, piece: str, last: bool = False) -> None:
        """Add text that holds no mark which is a token of its own."""
        if not self._started:
            self._leading += piece
            text = self._leading.lstrip()
            if self._close_matcher is not None and text.startswith(THINK[0]):
                self._leading, piece = self._leading[: len(self._leading) - len(text)], text[len(THINK[0]) :]
                self._switch(opens=True)
            elif not last and (not text or (self._close_matcher is not None and THINK[0].startswith(text))):
                return
            else:
                piece, self._leading, self._started = self._leading, "", True
        if self.thinking:
            self._add_reasoning(piece, last)
        else:
            self._add_content(piece, last)

    def _add_reasoning(self, piece: str, last: bool) -> None:
        rest = None
        if self._close_matcher is not None:
            end, piece = self._close_matcher.feed(piece), self._held + piece
            if end is None:
                piece, self._held = _split(piece, 0 if last else self._close_matcher.at)
            else:
                end += len(self._held)
                piece, rest, self._held = piece[: end - len(THINK[1])], piece[end:], ""
        self.text += piece
        self.reasoning += piece if self.reasoning else piece.lstrip("\n")
        if rest is not None:
            self._switch(opens=False)
            self._add_content(rest, last)

    def _add_content(self, piece: str, last: bool) -> None:
        if self._trim:
            rest = piece.lstrip("\n")
            self.text += piece[: len(piece) - len(rest)]
            self._trim, piece = not rest, rest
        if self._stops and (self._held or last or not self._firsts.isdisjoint(piece)):
            ends = [(end, -len(s.text)) for s in self._stops if (end := s.feed(piece)) is not None]
            before, piece = len(self._held), self._held + piece
            if ends:
                self.stopped, self._held = True, ""
                piece = piece[: before + sum(min(ends))]
            else:
                piece, self._held = _split(piece, 0 if last else max(s.at for s in self._stops))
        self.text += piece
        self.content += piece


def _split(text: str, last: int) -> tuple[str, str]:
    """A text without its last characters, and these."""
    return text[: len(text) - last], text[len(text) - last :]
