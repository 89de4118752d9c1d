"""Instructions to follow to the letter, judged by rules: `name = "instructions"`.

After IFEval (Zhou et al. 2023, 2311.07911): a topic and two or three rules, each of which a program can check. The
score is the fraction of the rules that the answer keeps; only all of them are correct.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.environment import Environment, Problem, text_key

TOPICS = ("rivers", "bread", "the moon", "bicycles", "tea", "trees", "cats", "rain", "trains", "music", "bees", "snow",
          "books", "bridges")  # fmt: skip
ENDINGS = ("That is all.", "The end.", "Thank you for reading.", "I hope this helps.")
WORDS = ("simple", "old", "quiet", "small", "bright", "slow")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
SENTENCE = re.compile(r"[^.!?]+[.!?]+")
BULLET = re.compile(r"^\* \S", re.MULTILINE)
TITLE = re.compile(r"<<[^<>\n]+>>")


@dataclass(frozen=True)
class Kind:
    """Of a rule: what it says and whether a text keeps it, given its value; values are drawn from `values`."""

    says: Callable[[Any], str]
    kept: Callable[[str, Any], bool]
    values: tuple[Any, ...]
    excludes: tuple[str, ...] = ()  # kinds that it cannot be with


def sentences(text: str) -> list[str]:
    return [found.strip() for found in SENTENCE.findall(TITLE.sub("", text))]


KINDS: dict[str, Kind] = {
    "sentences": Kind(
        lambda n: f"Write exactly {NUMBERS[n]} sentences.", lambda t, n: len(sentences(t)) == n, (2, 3, 4), ("bullets",)
    ),
    "bullets": Kind(
        lambda n: f'Write exactly {NUMBERS[n]} bullet points, each on a line that begins with "* ".',
        lambda t, n: len(BULLET.findall(t)) == n,
        (2, 3, 4),
        ("sentences", "ending", "words"),
    ),
    "no_commas": Kind(lambda _: "Do not use any commas.", lambda t, _: "," not in t, (None,)),
    "lower": Kind(
        lambda _: "Use only small letters.", lambda t, _: t == t.lower() and bool(t.strip()), (None,), ("ending",)
    ),
    "ending": Kind(
        lambda end: f'End with the exact words "{end}"',
        lambda t, end: t.rstrip().endswith(end),
        ENDINGS,
        ("bullets", "lower"),
    ),
    "word": Kind(
        lambda word: f'Use the word "{word}".',
        lambda t, word: re.search(rf"\b{word}\b", t, re.IGNORECASE) is not None,
        WORDS,
    ),
    "title": Kind(
        lambda _: "Begin with a title in double angle brackets, such as <<title>>.",
        lambda t, _: TITLE.match(t.lstrip()) is not None,
        (None,),
    ),
    "words": Kind(
        lambda n: f"Use at most {n} words.", lambda t, n: 0 < len(t.split()) <= n, (30, 40, 50), ("bullets",)
    ),
}


class Instructions(Environment):
    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)

    def candidate(self, seed: int, index: int) -> Problem:
        rng = Random(f"instructions/{seed}/{index}")
        topic, rules = rng.choice(TOPICS), draw_rules(rng)
        said = [KINDS[kind].says(value) for kind, value in rules]
        question = f"Write about {topic}. " + " ".join(said)
        return Problem(
            question=question,
            answer="",
            key=text_key(question),
            difficulty=f"rules={len(rules)}",
            family=self.family,
            metadata={"topic": topic, "rules": rules},
        )

    def check(self, problem: Problem, answer: str) -> float:
        rules = problem.metadata["rules"]
        return sum(KINDS[kind].kept(answer.strip(), value) for kind, value in rules) / len(rules)


def draw_rules(rng: Random) -> list[tuple[str, Any]]:
    """Two or three rules that can be kept together, each a kind and its value."""
    wanted, rules = rng.randint(2, 3), list[tuple[str, Any]]()
    names = list(KINDS)
    rng.shuffle(names)
    for name in names:
        if len(rules) < wanted and all(name not in KINDS[other].excludes for other, _ in rules):
            rules.append((name, rng.choice(KINDS[name].values)))
    return rules
