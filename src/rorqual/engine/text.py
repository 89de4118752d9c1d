"""Text from tokens as they come: no half characters, nothing of a stop string, the thinking apart from the answer."""

from typing import Any

from tokenizers.decoders import ByteLevel

UNFINISHED = "\ufffd"  # what a character decodes to while bytes of it are missing
PATIENCE = 32  # tokens that may wait for the end of a character: what is none yet will not become one
AGAIN = 8  # tokens before the new ones that are decoded with them, since a tokenizer may join what stands side by side


class Speller:
    """Text of tokens, for any number of streams."""

    def __init__(self, tokenizer: Any) -> None:
        # Not the tokenizer's own decode, which takes several times as long around this one.
        self._tokenizer = tokenizer.backend_tokenizer
        self._alone = isinstance(self._tokenizer.decoder, ByteLevel)
        self._known: dict[int, str | None] = {}

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def alone(self, token: int) -> str | None:
        """What a token reads whatever stands beside it, as in byte-level vocabularies; None for part of a character,
        and in other vocabularies.
        """
        if not self._alone:
            return None
        if token not in self._known:
            text = self.decode([token])
            self._known[token] = None if UNFINISHED in text else text
        return self._known[token]


class TextStream:
    """`feed` takes a continuation's tokens, all so far, and gives the text that can be shown since the last call.

    `text` is all that was shown; `stopped` says that a stop string came, before which the text ends. `think`: the
    tokens that open and close thinking, where the model has them; `thinking`: the prompt has opened it. Stop strings
    count in the answer only: what ends an answer, say an empty line, is common in thoughts.
    """

    def __init__(
        self, speller: Speller, stop: tuple[str, ...], think: tuple[int, int] | None = None, thinking: bool = False
    ) -> None:
        self._speller, self._stop, self._think = speller, stop, think
        self._read = 0  # tokens that are in _whole
        self._whole = ""  # decoded, shown or held back
        self.text = ""
        self.stopped = False
        self.thinking = thinking
        self.reasoning_tokens = 0
        # Where in the text the thoughts lie, and where the answer begins.
        self._thoughts, self._answer = slice(0, 0), 0

    @property
    def reasoning(self) -> str:
        return self.text[self._thoughts].lstrip("\n")

    @property
    def content(self) -> str:
        return "" if self.thinking else self.text[self._answer :].lstrip("\n")

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """last: no more will come, so what was held back is shown."""
        if self.stopped:
            return ""
        spelt = [self._speller.alone(token) for token in tokens[self._read :]]
        if None not in spelt:
            self._whole += "".join(text for text in spelt if text)  # a tenth of the time of decoding
        else:
            tokens = tokens if last else self._readable(tokens)
            if len(tokens) == self._read:
                return ""
            start = max(0, self._read - AGAIN)
            before, after = self._speller.decode(tokens[start : self._read]), self._speller.decode(tokens[start:])
            # Usually the new text follows; where the tokenizer reads the old tokens differently now, everything counts.
            self._whole = (
                self._whole + after[len(before) :] if after.startswith(before) else self._speller.decode(tokens)
            )
        self._split(tokens)
        self._read = len(tokens)
        first = self._answer
        found = [at for s in self._stop if (at := self._whole.find(s, max(first, len(self.text) - len(s)))) >= 0]
        if found and not self.thinking:
            self.stopped, end = True, min(found)
        else:
            end = len(self._whole) - (0 if last or self.thinking else self._held_back())
        piece = self._whole[len(self.text) : end]
        self.text += piece
        return piece

    def _readable(self, tokens: list[int]) -> list[int]:
        """As many as end with a whole character. A token may end one and begin the next, so that many may wait."""
        start = max(0, self._read - AGAIN)
        for end in range(len(tokens), self._read, -1):
            if not self._speller.decode(tokens[start:end]).endswith(UNFINISHED):
                return tokens[:end]
        return tokens if len(tokens) - self._read >= PATIENCE else tokens[: self._read]

    def _split(self, tokens: list[int]) -> None:
        """Note where thinking opens and closes, by the tokens that say so."""
        if self._think is None:
            return
        opens, closes = self._think
        if self._read == 0 and tokens and tokens[0] == opens:
            self.thinking, self._thoughts = True, slice(len(self._speller.decode(tokens[:1])), None)
        elif self._read == 0 and self.thinking:
            self._thoughts = slice(0, None)
        if not self.thinking:
            return
        began = int(bool(tokens) and tokens[0] == opens)
        if closes in tokens[self._read :]:
            at = tokens.index(closes)
            self.thinking, self.reasoning_tokens = False, at - began
            self._thoughts = slice(self._thoughts.start, len(self._speller.decode(tokens[:at])))
            self._answer = len(self._speller.decode(tokens[: at + 1]))
        else:
            self.reasoning_tokens = len(tokens) - began

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if not self._stop:
            return 0
        longest = max(len(s) for s in self._stop) - 1
        for count in range(min(longest, len(self._whole) - self._answer), 0, -1):
            if any(s.startswith(self._whole[-count:]) for s in self._stop):
                return count
        return 0
