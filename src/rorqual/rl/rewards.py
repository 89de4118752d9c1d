"""Rule-based rewards (R1 §2.1, supplement), the user's own functions and a reward model (R1 §2.3.4): each part, then
their weighted sum.
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.cores import usable_cores
from rorqual.errors import UserError
from rorqual.recipe import RewardSection
from rorqual.rl.envs.environment import Environment, RewardError, Sample
from rorqual.rl.envs.user_functions import UserReward, reward_function
from rorqual.rl.reward_scorer import RewardScorer
from rorqual.rl_sections import HELPFULNESS
from rorqual.shapes import Bool, Float

RIGHT, WRONG = "✓", "✗"  # self-verification marks that a model puts after a candidate in its thinking
OVERLONG = 0.2  # fraction of max_tokens over which the overlong penalty grows (DAPO §3.4: 4096 of 20480)

FORMAT = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")

SCRIPTS = {
    "ar": ("ARABIC",), "el": ("GREEK",), "he": ("HEBREW",), "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",), "ru": ("CYRILLIC",), "th": ("THAI",), "uk": ("CYRILLIC",), "zh": ("CJK",),
} | dict.fromkeys(("cs", "de", "en", "es", "fr", "it", "nl", "pl", "pt", "sv", "tr", "vi"), ("LATIN",))  # fmt: skip
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI")  # scripts without spaces: each character counts as a word


@dataclass(frozen=True)
class Rewards:
    """Of N samples. `parts`: by name, unweighted; `total`: their weighted sum; both are 0 for a skipped sample.

    A part is NaN where it does not exist: accuracy and verdict of an open problem, helpfulness of others.
    """

    parts: dict[str, Float[Tensor, " N"]]
    total: Float[Tensor, " N"]
    correct: Bool[Tensor, " N"]
    skipped: Bool[Tensor, " N"]  # a user's function gave no reward; not trained on
    notes: list[str] = field(default_factory=list[str])  # which, and why

    def grouped(self, size: int) -> Float[Tensor, "Q G"]:
        """The totals by group. A skipped sample has the mean of the others, which it thus leaves as it is."""
        total, kept = self.total.view(-1, size), ~self.skipped.view(-1, size)
        if bool(kept.all()):
            return total
        means = (total * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return torch.where(kept, total, means)

    def mean(self, part: Float[Tensor, " N"]) -> float:
        """Of the samples that were not skipped and have the part; NaN for none."""
        return float(part[~self.skipped & ~part.isnan()].mean())

    @property
    def ruled(self) -> Bool[Tensor, " N"]:
        """Whether a rule says which answers are right: not of open problems."""
        return ~self.parts["accuracy"].isnan()

    def of(self, members: Sequence[int]) -> "Rewards":
        """Those of some of the samples."""
        parts = {name: part[members] for name, part in self.parts.items()}
        return Rewards(parts, self.total[members], self.correct[members], self.skipped[members], self.notes)

    @classmethod
    def joined(cls, rewards: Sequence["Rewards"]) -> "Rewards":
        """Of all their samples."""
        parts = {name: torch.cat([r.parts[name] for r in rewards]) for name in rewards[0].parts}
        total, correct, skipped = (
            torch.cat([getattr(r, name) for r in rewards]) for name in ("total", "correct", "skipped")
        )
        return cls(parts, total, correct, skipped, [note for r in rewards for note in r.notes])


Verdict = Callable[[Sample, bool], float]


def score(
    samples: Sequence[Sample],
    environments: Mapping[str, Environment],
    section: RewardSection,
    max_tokens: int,
    verdict: Verdict | None = None,
    scorer: RewardScorer | None = None,
) -> Rewards:
    """Score N samples. Parts of weight 0 are not computed, except accuracy, which every report needs.

    A truncated completion is never correct, whatever answer it contains: the model did not end it there. A sample that
    a user's function gives no reward is skipped. `environments` by family; `verdict(sample, correct)` scores the
    self-verification, by default `marked_verdict`; `scorer` the answers to open problems.
    """
    verdict = verdict or marked_verdict
    graders = [environments[s.problem.family] for s in samples]
    if any(environment.runs_programs for environment in graders):  # then threads wait for them
        with ThreadPoolExecutor(usable_cores()) as pool:
            graded = list(pool.map(_graded, samples, graders))
    else:
        graded = [_graded(*pair) for pair in zip(samples, graders, strict=True)]
    values, correct = [value for value, _, _ in graded], [right for _, right, _ in graded]
    errors = [error for _, _, error in graded]
    scorers: dict[str, Callable[[int], float]] = {
        "accuracy": lambda i: values[i],
        "format": lambda i: format_reward(samples[i].text),
        "language": lambda i: language_reward(samples[i].text, section.target_language),
        "length": lambda i: length_reward(samples[i].length, max_tokens, samples[i].truncated),
        "verdict": lambda i: math.nan if graders[i].open else verdict(samples[i], correct[i]),
    }
    weights = {name: getattr(section, name) for name in scorers}
    for name, function in section.functions.items():
        call = reward_function(function.python, f"reward.functions.{name}", section.timeout)
        scorers[name], weights[name] = _of_function(call, samples, graders, errors), function.weight
    if section.model is not None and scorer is not None:
        ours = [i for i, environment in enumerate(graders) if environment.open]
        helpful = dict(zip(ours, scorer([samples[i] for i in ours]), strict=True))
        scorers[HELPFULNESS] = lambda i: helpful.get(i, math.nan)
        weights[HELPFULNESS] = section.model.weight
    parts = {
        name: torch.tensor([scorer(i) for i in range(len(samples))])
        for name, scorer in scorers.items()
        if weights[name] or name == "accuracy" or name in section.functions
    }
    skipped = torch.tensor([bool(error) for error in errors])
    parts = {name: part.masked_fill(skipped, 0.0) for name, part in parts.items()}
    total = sum((weights[name] * part.nan_to_num() for name, part in parts.items()), torch.zeros(len(samples)))
    counts = Counter(error for error in errors if error)
    notes = [f"{count} of {len(samples)} samples skipped: {error}" for error, count in counts.items()]
    return Rewards(parts, total, torch.tensor(correct, dtype=torch.bool), skipped, notes)


def _graded(sample: Sample, environment: Environment) -> tuple[float, bool, str]:
    """(reward, NaN of an open problem; whether it is correct; why it has none)."""
    if environment.open:
        return math.nan, False, ""
    try:
        if sample.error:
            raise RewardError(sample.error)
        return *environment.grade(sample), ""
    except RewardError as e:
        return 0.0, False, str(e)


def _of_function(
    function: UserReward, samples: Sequence[Sample], graders: Sequence[Environment], errors: list[str]
) -> Callable[[int], float]:
    """The scorer that calls a user's function; it puts into `errors` why a sample has no reward."""

    def scorer(i: int) -> float:
        if not errors[i]:
            try:
                return function(samples[i], graders[i])
            except RewardError as e:
                errors[i] = str(e)
        return 0.0

    return scorer


def format_reward(text: str) -> float:
    """1 for exactly `<think>…</think><answer>…</answer>`, neither empty, with optional surrounding spaces; else 0."""
    match = FORMAT.fullmatch(text)
    if match is None or any(TAG.search(inner) or not inner.strip() for inner in match.groups()):
        return 0.0
    return 1.0


def length_reward(length: int, max_tokens: int, truncated: bool = False) -> float:
    """Soft overlong penalty (DAPO, 2503.14476, eq. 13), in [−1, 0]: falls to −1 over the last fifth of `max_tokens`.

    length: sampled tokens. A truncated completion gets −1.
    """
    if truncated:
        return -1.0
    soft = OVERLONG * max_tokens
    return max(-1.0, min(0.0, (max_tokens - soft - length) / soft))


def language_reward(text: str, target: str) -> float:
    """Fraction of the words in the thinking that are in the target language's script, in [0, 1] (R1 §2.3.2).

    A word is a run of letters, or one character in scripts without spaces; without words the reward is 1. Script is a
    proxy for language: it separates Chinese from English, the mixing seen in R1, but not French from English. Raises
    UserError for an unknown `target`.
    """
    if target not in SCRIPTS:
        raise UserError(f"reward.target_language = {target!r} is not known; use one of {', '.join(sorted(SCRIPTS))}")
    thinking = text.partition("</think>")[0] if "</think>" in text else text
    scripts = _word_scripts(TAG.sub(" ", thinking))
    return sum(s in SCRIPTS[target] for s in scripts) / len(scripts) if scripts else 1.0


def self_verified(text: str) -> bool:
    """Whether the last self-verification mark in the thinking is ✓."""
    thinking = text.partition("</think>")[0]
    return thinking.rfind(RIGHT) > thinking.rfind(WRONG)


def marked_verdict(sample: Sample, correct: bool) -> float:
    """1 for ✓ on a correct answer, −1 for ✓ on a wrong one, 0 without ✓: a false ✓ must cost more than giving up."""
    if not self_verified(sample.text):
        return 0.0
    return 1.0 if correct else -1.0


def _word_scripts(text: str) -> list[str]:
    words: list[str] = []
    for run in re.finditer(r"[^\W\d_]+", text):
        previous = None
        for script in map(_script, filter(str.isalpha, run[0])):
            if script in UNSPACED or script != previous:
                words.append(script)
            previous = script
    return words


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
