"""Search over local documents: BM25 (Robertson and Zaragoza 2009, §3.2)."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from rorqual.data.corpus import named, read_records
from rorqual.errors import UserError, file_error
from rorqual.files import read_text

K1, B = 1.2, 0.75  # saturation of a word's count, and how much a long passage counts less
WORD = re.compile(r"\w+")


class Index:
    """The passages below `path`: the paragraphs of .txt and .md files, the `text` of lines of .jsonl(.gz)."""

    def __init__(self, path: str) -> None:
        """Raises UserError where there is no passage."""
        self.passages = list(_passages(Path(path)))
        if not self.passages:
            raise UserError(f"{path} holds no document; it must be a .txt, .md or .jsonl file, or a folder of them")
        self.counts: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word → (passage, how often)
        self.lengths: list[int] = []
        for number, passage in enumerate(self.passages):
            words = _words(passage)
            self.lengths.append(len(words))
            for word, count in Counter(words).items():
                self.counts[word].append((number, count))
        self.mean = sum(self.lengths) / len(self.lengths)

    def scores(self, query: str) -> dict[int, float]:
        """The BM25 score of every passage with a word of the query."""
        found: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(_words(query)):
            holders = self.counts.get(word, [])
            rarity = math.log(1 + (len(self.passages) - len(holders) + 0.5) / (len(holders) + 0.5))
            for number, count in holders:
                length = 1 - B + B * self.lengths[number] / self.mean
                found[number] += rarity * count * (K1 + 1) / (count + K1 * length)
        return found

    def best(self, query: str, n: int) -> list[str]:
        """The `n` passages with the highest scores, the earlier one of equals first."""
        found = self.scores(query)
        return [self.passages[i] for i in sorted(found, key=lambda i: (-found[i], i))[:n]]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _passages(path: Path) -> Iterator[str]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):  # sorted: the same order everywhere
            if file.is_file() and named(file, ".txt", ".md", ".jsonl", ".jsonl.gz"):
                yield from _passages(file)
        return
    if named(path, ".jsonl", ".jsonl.gz"):
        for where, row in read_records(path):
            if not isinstance(text := row.get("text"), str):
                raise UserError(f"{where}: there is no text; add a field `text`")
            yield text
        return
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as e:
        raise file_error(path, e, "read") from e
    yield from (part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
