"""What the writers share: the turns of phrase of someone who thinks on paper."""

from dataclasses import dataclass
from random import Random

SLIPS = 0.2  # fraction of the solutions in which a check finds an error

OPENINGS = (
    "Let me work this out step by step.",
    "I will go one step at a time.",
    "First I look at what is asked.",
    "Let me think.",
    "Okay, one step after the other.",
)
CHECKS = ("Let me check this.", "Now a check.", "I check it another way.", "Does that hold?")
AGREES = ("That agrees.", "It fits.", "Good, both ways agree.", "Yes, that is right.")
DIFFERS = (
    "These differ, so one of them is wrong. Again, slowly.",
    "Wait, that does not agree. I go over it again.",
    "Hmm, that is not the same. I made a mistake somewhere.",
)


@dataclass(frozen=True)
class Worked:
    """A worked solution: what stands between <think> tags, and in the answer."""

    thinking: str
    answer: str

    @property
    def completion(self) -> str:
        return f"<think>{self.thinking}</think><answer>{self.answer}</answer>"


def slips(rng: Random) -> bool:
    """Whether this solution holds an error that its check finds."""
    return rng.random() < SLIPS


def an(word: str) -> str:
    """With its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
