"""Split long texts into chunks, so that none has to be tokenised or held out as a whole."""

from collections.abc import Iterable, Iterator


def chunk_end(text: str, start: int, size: int) -> int:
    """End index of a chunk from `start`: of size/2 to `size` characters, or the text's end where that is near.

    It is the last line end in that range, else the last space, which begins the next chunk, else `start + size`.
    """
    if len(text) - start <= size + size // 2:
        return len(text)
    least, most = start + max(1, size // 2), start + size
    for newline in ("\n", "\r"):
        if (found := text.rfind(newline, least, most)) > 0 and text[found : found + 2] != "\r\n":
            return found + 1
    space = max(text.rfind(" ", least, most), text.rfind("\t", least, most))
    return space if space > 0 else most


def split_text(text: str, size: int) -> Iterator[str]:
    """The text in chunks of at most `size` characters; the last may have 1.5 × `size`."""
    start = 0
    while start < len(text):
        end = chunk_end(text, start, size)
        yield text[start:end]
        start = end


def split_stream(parts: Iterable[str], size: int) -> Iterator[str]:
    """The chunks of a text that arrives in parts of any length."""
    rest = ""
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > 2 * size:
            end = chunk_end(rest, start, size)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield from split_text(rest, size)
