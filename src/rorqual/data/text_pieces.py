"""Cutting long texts, so that none has to be tokenised or held out in one piece."""

from collections.abc import Iterable, Iterator


def end_of_piece(text: str, start: int, size: int) -> int:
    """Where a piece from `start` ends: after half of `size` to all of it, or with the text where that is near.

    The last line end in that range is taken, else the last space, which begins the next piece, else any place.
    """
    if len(text) - start <= size + size // 2:
        return len(text)
    least, most = start + max(1, size // 2), start + size
    for mark in ("\n", "\r"):
        if (found := text.rfind(mark, least, most)) > 0 and text[found : found + 2] != "\r\n":
            return found + 1
    space = max(text.rfind(" ", least, most), text.rfind("\t", least, most))
    return space if space > 0 else most


def pieces(text: str, size: int) -> Iterator[str]:
    """The whole text, in pieces of `size` characters at most but for the last."""
    start = 0
    while start < len(text):
        end = end_of_piece(text, start, size)
        yield text[start:end]
        start = end


def rejoined(parts: Iterable[str], size: int) -> Iterator[str]:
    """The pieces of a text that comes in parts of any length."""
    rest = ""
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > 2 * size:
            end = end_of_piece(rest, start, size)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield from pieces(rest, size)
