"""Text from tokens as they come: no half characters, nothing of a stop string, the thinking apart from the answer."""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rorqual.data.special_tokens import FRAMED, THINK, is_special

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # one byte, in SentencePiece's vocabularies
LATELY = 64  # tokens of a prompt in which an opened thinking is looked for where no token marks it
OPEN = re.compile(r"<think>\s*\Z")
SHUT = re.compile(r"(?:<think>\s*)?</think>\s*\Z")


class TokenDecoder:
    """What single tokens read, for any number of streams.

    `hidden`: tokens that are no part of any text: special ones, but for marks that a model writes in its own turn, and
    `ends`. `think`: the tokens that open and close thinking; None for a vocabulary that has none.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int] = ()) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = getattr(tokenizer, "added_tokens_decoder", {})
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()}
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", None))
        self._byte_level, self._pieces = "ByteLevel" in decoder, "▁" in decoder or "ByteFallback" in decoder
        self._known: dict[int, bytes] = {}
        self.think = thinking_tokens(tokenizer)
        self._walls = {*ends, *(n for n, t in self._added.items() if t.special or FRAMED.fullmatch(t.content))}
        self._walls -= set(self.think or ())
        self.hidden = {*ends, *(n for n, t in self._added.items() if is_special(t.content, t.special))}
        self.hidden -= set(self.think or ())

    def bytes(self, token: int) -> bytes:
        """A token may be less than a character, and hidden ones are read by their names."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._read(token)
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of what follows another text: SentencePiece's first space stays."""
        return b"".join(self.bytes(t) for t in tokens if t not in self.hidden).decode(errors="replace")

    def opening(self, prompt: Sequence[int]) -> str:
        """What a prompt has written of the answer: the mark that opens its thinking and what follows, or marks with
        nothing between and behind them, which leave it out; else "". Marks of earlier turns do not count.
        """
        if self.think is None:
            lately = self.decode(prompt[-LATELY:])
            found = OPEN.search(lately) or SHUT.search(lately)
            return found[0] if found else ""
        opens, closes = self.think
        begin = closed = None
        for at in range(len(prompt) - 1, -1, -1):
            token = prompt[at]
            if token == opens:
                begin = at
            elif token == closes and closed is None:
                closed = at
            if begin is not None or token in self._walls:
                break
        if closed is None:
            return "" if begin is None else self.decode(prompt[begin:])
        said = self.decode(prompt[closed if begin is None else begin :])
        return said if SHUT.fullmatch(said) else ""

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        if self._byte_level:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            if all(char in self._bytes for char in piece):
                return bytes(self._bytes[char] for char in piece)
            return str(piece).encode()
        if self._pieces:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            byte = BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        return self._tokenizer.decode([token]).encode()


def thinking_tokens(tokenizer: Any) -> tuple[int, int] | None:
    """The tokens that open and close thinking; None for a model that has none."""
    vocabulary = tokenizer.get_vocab()
    found = tuple(vocabulary.get(name) for name in THINK)
    return None if None in found else found


def leaves_open(opening: str) -> bool:
    """Whether thinking goes on after what a prompt has written of it."""
    return bool(opening) and not SHUT.fullmatch(opening)


class StopMatcher:
    """Looks for a string in a text that comes piece by piece (Knuth, Morris and Pratt 1977).

    A character takes the same time however long the string and the text are. `at`: how much of the string stands at
    the end of the text.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._borders = [0]  # of the string's beginnings: the longest end that is a beginning; made as far as needed

    def feed(self, piece: str) -> int | None:
        """How much of the piece there is up to the string's end; None where it is not complete."""
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


class IncrementalDetokenizer:
    """`feed` takes a continuation's tokens, all so far, and gives the text that can be shown since the last call.

    `text` is all that was shown, of which `reasoning` and `content` are the thoughts and the answer, each without the
    empty lines that thinking ends and begins with. `stopped` says that a stop string came, before which the text ends;
    of several the one that is complete first. They count in the answer only: what ends an answer, say an empty line, is
    common in thoughts. `opening`: what the prompt has written (`TokenDecoder.opening`). `thoughts`: tokens, from the
    first on, that belong to the thinking.
    """

    def __init__(self, speller: TokenDecoder, stop: tuple[str, ...] = (), opening: str = "") -> None:
        self._speller, self._think = speller, speller.think or (-1, -1)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._firsts = [StopMatcher(s) for s in stop], {s[0] for s in stop}
        self._read = 0  # tokens
        self.text = self.reasoning = self.content = ""
        self.stopped, self.thinking = False, leaves_open(opening)
        self.reasoning_tokens = self.thoughts = 0
        self._begun = self.thinking  # whether the answer, or its thinking, has
        self._trim = bool(opening)  # line breaks that come now are neither thoughts nor answer
        self._lead = ""  # white space before the model opens its thinking, if it does
        self._held = ""  # of the answer: what may be the beginning of a stop string
        self._closing = StopMatcher(THINK[1]) if speller.think is None else None

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """last: no more will come, so what was held back is shown."""
        if self.stopped:
            return ""
        before, speller = len(self.text), self._speller
        for token in tokens[self._read :]:
            self._read += 1
            if token in self._think and self._mark(token):
                continue
            if self.thinking:
                self.reasoning_tokens += 1
                self.thoughts = self._read
            if token in speller.hidden:
                continue
            if piece := self._utf8.decode(speller.bytes(token)):
                self._say(piece)
                if self.stopped:
                    break
        if last and not self.stopped:
            self._say(self._utf8.decode(b"", True), last=True)
        return self.text[before:]

    def _mark(self, token: int) -> bool:
        """Whether a token opens or closes thinking here; elsewhere it is text."""
        if token == self._think[0]:
            if self._begun and (self.text or not self.thinking):
                return False
        elif not self.thinking:
            return False
        if rest := self._utf8.decode(b"", True):
            self._say(rest)
        self._turn(token == self._think[0])
        self.thoughts = self._read - (token == self._think[1])
        return True

    def _turn(self, opens: bool) -> None:
        self.text += self._lead + THINK[not opens]
        self._lead, self.thinking, self._begun, self._trim = "", opens, True, True

    def _say(self, piece: str, last: bool = False) -> None:
        """Add text, none of it a mark that is a token."""
        if not self._begun:
            self._lead += piece
            said = self._lead.lstrip()
            if self._closing is not None and said.startswith(THINK[0]):
                self._lead, piece = self._lead[: len(self._lead) - len(said)], said[len(THINK[0]) :]
                self._turn(opens=True)
            elif not last and (not said or (self._closing is not None and THINK[0].startswith(said))):
                return
            else:
                piece, self._lead, self._begun = self._lead, "", True
        if self.thinking:
            self._reason(piece, last)
        else:
            self._answer(piece, last)

    def _reason(self, piece: str, last: bool) -> None:
        rest = None
        if self._closing is not None:
            end, piece = self._closing.feed(piece), self._held + piece
            if end is None:
                piece, self._held = _split(piece, 0 if last else self._closing.at)
            else:
                end += len(self._held)
                piece, rest, self._held = piece[: end - len(THINK[1])], piece[end:], ""
        self.text += piece
        self.reasoning += piece if self.reasoning else piece.lstrip("\n")
        if rest is not None:
            self._turn(opens=False)
            self._answer(rest, last)

    def _answer(self, piece: str, last: bool) -> None:
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
    """A text but for its last characters, and these."""
    return text[: len(text) - last], text[len(text) - last :]
