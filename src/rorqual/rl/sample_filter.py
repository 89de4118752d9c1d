"""Which correct completions are fit to learn from (R1 §2.3.3: no mixed languages, long paragraphs or code blocks)."""

import re
from collections import Counter

from rorqual.recipe import FilterSection
from rorqual.rl.rewards import language_reward

PARAGRAPH = 1000  # characters
REPEATS = 4  # of one line of at least LINE characters
LINE = 10


def refused(text: str, length: int, wanted: FilterSection, language: str) -> str | None:
    """Why a completion of `length` tokens is left out; None where it is kept."""
    if wanted.max_tokens is not None and length > wanted.max_tokens:
        return "too long"
    if wanted.language and language_reward(text, language) < wanted.language:
        return "mixed languages"
    return "unreadable" if wanted.readable and not readable(text) else None


def readable(text: str) -> bool:
    """Whether the thinking has no paragraph of more than 1000 characters, no code block and no line four times."""
    thinking = text.partition("</think>")[0]
    if "```" in thinking or any(len(part) > PARAGRAPH for part in re.split(r"\n\s*\n", thinking)):
        return False
    lines = Counter(line.strip() for line in thinking.splitlines() if len(line.strip()) >= LINE)
    return max(lines.values(), default=0) < REPEATS
