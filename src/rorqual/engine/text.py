"""Text from tokens as they come: no half characters, and nothing of a stop string."""

from typing import Any

UNFINISHED = "\ufffd"  # what a character decodes to while bytes of it are missing
AGAIN = 8  # tokens before the new ones that are decoded with them, since a tokenizer may join what stands side by side


class TextStream:
    """`feed` takes a continuation's tokens, all so far, and gives the text that can be shown since the last call.

    `text` is all that was shown; `stopped` says that a stop string came, before which the text ends.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._read = 0  # tokens that are in _whole
        self._whole = ""  # decoded, shown or held back
        self.text = ""
        self.stopped = False

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """last: no more will come, so what was held back is shown."""
        if self.stopped:
            return ""
        start = max(0, self._read - AGAIN)
        before, after = self._decode(tokens[start : self._read]), self._decode(tokens[start:])
        if after.endswith(UNFINISHED) and not last and len(tokens) - self._read < 8:  # no character is longer
            return ""
        # Usually the new text follows; where the tokenizer reads the old tokens differently now, everything counts.
        self._whole = self._whole + after[len(before) :] if after.startswith(before) else self._decode(tokens)
        self._read = len(tokens)
        found = [at for s in self._stop if (at := self._whole.find(s, max(0, len(self.text) - len(s)))) >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._whole) - (0 if last else self._held_back())
        piece = self._whole[len(self.text) : end]
        self.text += piece
        return piece

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for count in range(min(longest, len(self._whole)), 0, -1):
            if any(s.startswith(self._whole[-count:]) for s in self._stop):
                return count
        return 0

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
