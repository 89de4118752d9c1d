"""Read tool calls in the text of an answer, whole or as it comes, for serving and RL alike."""

from rorqual.data.tool_formats import Call, Format


class CallReader:
    """Splits an answer's text, as it comes, into text to show and calls, each as soon as it is complete.

    names: the functions that may be called. parallel: more than one call may follow. `cut_off`: the text ended within a
    call, which is then shown as text.
    """

    def __init__(self, form: Format, names: set[str], parallel: bool = True) -> None:
        self._form, self._names, self._parallel = form, names, parallel
        self._held, self._searched = "", 0  # text not returned yet; how much of it was searched for a call's end
        self._has_text = False  # text other than calls was found
        self._calls = 0
        self._after = False  # a call has just ended
        self.cut_off = False

    def feed(self, piece: str, last: bool) -> tuple[str, list[Call]]:
        """Add text → text to show, and complete calls. last: no more text follows."""
        self._held += piece
        shown, calls = "", list[Call]()
        while self._held and (not self._after or self._skip_close(last)):
            at, begun = self._find_call(last)
            shown += self._take_text(at)
            if not begun or not (last or self._may_end()):
                break
            read = self._form.read(self._held, self._names, last)
            if read is not None:
                self._held, self._searched, self._after = self._held[read[1] :], 0, True
                calls += read[0] if self._parallel else read[0][: 1 - self._calls]
                self._calls += len(read[0])
            elif last:  # no call, or an incomplete one
                self.cut_off = self._form.end is None or self._form.end not in self._held
                shown += self._take_text(self._mark_length())
            else:
                break
        return shown, calls

    def _take_text(self, length: int) -> str:
        """Remove and return the first `length` characters of the held text."""
        text, self._held = self._held[:length], self._held[length:]
        self._has_text = self._has_text or bool(text.strip())
        self._searched = 0 if text else self._searched
        return text

    def _find_call(self, last: bool) -> tuple[int, bool]:
        """The index at which a call starts, and whether its mark is complete; the text's length where none does."""
        held, opens = self._held, self._form.opens
        if self._form.bare:
            word = held.lstrip()
            begun = word.startswith(opens)
            possible = begun or (not last and _is_prefix(word, opens))
            return (0, begun) if possible and not self._has_text else (len(held), False)
        found = [at for mark in opens if (at := held.find(mark)) >= 0]
        if found:
            return min(found), True
        longest = 0 if last else min(len(held), max(map(len, opens)) - 1)
        return next((len(held) - n for n in range(longest, 0, -1) if _is_prefix(held[-n:], opens)), len(held)), False

    def _mark_length(self) -> int:
        """The length of the mark at the start of the held text; of all of it for a form without marks."""
        if self._form.bare:
            return len(self._held)
        return next(len(mark) for mark in self._form.opens if self._held.startswith(mark))

    def _may_end(self) -> bool:
        end = self._form.end
        if end is None:
            return False
        start, self._searched = max(0, self._searched - len(end)), len(self._held)
        return end in self._held[start:]

    def _skip_close(self, last: bool) -> bool:
        """Skip the text that closes calls; False where more text is needed to tell what follows."""
        word, close = self._held.lstrip(), self._form.close
        if close and word.startswith(close):
            self._held = word[len(close) :]
            return True
        if close.startswith(word):
            self._held = "" if last else self._held
            return False
        if word.startswith(self._form.opens):
            self._held = word
        elif not last and _is_prefix(word, self._form.opens):
            return False
        self._after = False
        return True


def _is_prefix(text: str, marks: tuple[str, ...]) -> bool:
    """Whether a text may be the start of a mark."""
    return any(mark.startswith(text) for mark in marks)
