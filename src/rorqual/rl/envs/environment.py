"""Problems with verifiable answers, and the train/dev/test splits that prevent contamination.

A problem's split is a hash of its key alone, so it is the same in every stage, seed, prompt and environment. The key is
the sorted multiset of the integers in the question, or the normalised text where the integers belong to the wording: no
multiset (or text) of one split occurs in another.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from string import Formatter
from typing import Any, Literal, TypeGuard, cast

from rorqual.data.chat_messages import Message, Tool
from rorqual.data.tool_formats import Format
from rorqual.errors import UserError
from rorqual.judge.extract_answer import read_answer

Split = Literal["train", "dev", "test"]
TRAIN, DEV = 0.8, 0.1  # fractions of the keys; the rest is test
CHUNK = 64  # candidates generated per background task
CACHED_CHUNKS = 16


@dataclass(frozen=True)
class Problem:
    question: str  # before the prompt template is applied
    answer: str  # a correct answer
    key: str  # its hash decides the split
    difficulty: str  # label to group results by, e.g. "num_terms=3"; "" where the source has none
    family: str  # the environment's name
    where: str = field(default="", compare=False)  # file and line, of a problem from a file
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    messages: Sequence[Message] | None = field(default=None, compare=False)  # the prompt's; None: the question
    tools: Sequence[Tool] | None = field(default=None, compare=False)  # that are described to the model

    @property
    def split(self) -> Split:
        return split_of(self.key)

    @property
    def fields(self) -> dict[str, Any]:
        """What a user's function gets."""
        return {"question": self.question, "answer": self.answer, "difficulty": self.difficulty} | self.metadata

    @property
    def conversation(self) -> list[Message]:
        """The prompt's messages."""
        return list(self.messages or [{"role": "user", "content": self.question}])


@dataclass
class Episode:
    """A problem and what was said on it, as an environment sees it."""

    problem: Problem
    messages: list[Message]  # the prompt's, then the model's turns and what was said to it
    rng: Random  # of this episode alone: the same in a run that is resumed
    calls: Format  # how the model writes tool calls
    state: dict[str, Any] = field(default_factory=dict)  # the environment's own, of this episode

    @property
    def text(self) -> str:
        """The model's last turn."""
        return self.messages[-1]["content"] or ""


@dataclass(frozen=True)
class Sample:
    """One completion, or one episode of several turns.

    `text`: the last turn, with an opening tag that the prompt ends with (`<think>`), but no stop token.
    """

    problem: Problem
    text: str
    length: int  # sampled tokens, the stop tokens included
    truncated: bool  # stopped by a limit of tokens or turns
    turns: Sequence[Message] = ()  # of an episode: all messages after the prompt's
    state: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # why its episode broke off: it then has no reward

    @property
    def messages(self) -> list[Message]:
        """The prompt's messages and all after them."""
        answer: Message = {"role": "assistant", "content": self.text}
        return [*self.problem.conversation, *(self.turns or [answer])]


class RewardError(Exception):
    """A user's function gave no reward; the message says which and why."""


def split_of(key: str) -> Split:
    """80% of the keys are train, 10% dev, 10% test, by SHA-256."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "train" if share < TRAIN else "dev" if share < TRAIN + DEV else "test"


def number_key(numbers: Iterable[int]) -> str:
    return " ".join(map(str, sorted(numbers)))


def text_key(text: str) -> str:
    return " ".join(text.lower().split())


def integers(text: str) -> list[int]:
    """The runs of digits in `text`, without signs; a decimal point separates two runs."""
    return [int(run) for run in re.findall(r"\d{1,4000}", text)]


class PromptFormat:
    """A recipe's `prompt`: a Python format string over a problem's fields, lists joined by spaces.

    Raises UserError for an invalid format string, an unknown field or a format that does not fit a value.
    """

    def __init__(self, template: str, known: Iterable[str], environment: str) -> None:
        self.template, self.environment = template, environment
        known = sorted(known)
        try:
            names = list(_names(template))
        except ValueError as e:
            raise UserError(f"environment {environment}: prompt {template!r} is not a format string ({e})") from None
        self.names = set(names)
        for name in names:
            if name not in known:
                raise UserError(
                    f"environment {environment}: prompt field {{{name}}} is unknown; use {', '.join(known)}"
                )

    def __call__(self, fields: dict[str, Any]) -> str:
        try:
            return self.template.format_map({name: _joined(value) for name, value in fields.items()})
        except (ValueError, TypeError) as e:  # {question:d}
            raise UserError(
                f"environment {self.environment}: prompt {self.template!r} cannot be filled ({e})"
            ) from None


def _joined(value: Any) -> Any:
    return " ".join(map(str, cast("Sequence[object]", value))) if isinstance(value, list | tuple) else value


def _names(template: str) -> Iterator[str]:
    """The fields of a format string, including those nested in format specifications: {question:{width}}."""
    for _, name, inner, _ in Formatter().parse(template):
        if name is not None:
            yield name
            yield from _names(inner or "")


class Environment(ABC):
    """Source of problems and verifier of answers. Candidate `index` of `seed` is always the same problem."""

    remedy = "widen its config"  # advice in the error for too few problems
    open = False  # no rule says which answers are right
    runs_programs = False  # to check an answer, so that several may be checked at a time
    turns = 1  # of the model in an episode, at most
    turn_tokens: int | None = None  # that the model may sample in a turn; None: what is left of the episode's

    def __init__(self, family: str, weight: float) -> None:
        self.family, self.weight = family, weight
        self.fits: Callable[[Problem], bool] | None = None  # problems it rejects are skipped
        self._chunks: dict[tuple[int, int], Future[list[Problem | None]]] = {}
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix=f"problems-{family}")
        self._scores: dict[tuple[str, str, str], float] = {}

    @abstractmethod
    def candidate(self, seed: int, index: int) -> Problem | None:
        """Problem number `index`, of any split; None where the source has none for it."""

    @abstractmethod
    def check(self, problem: Problem, answer: str) -> float:
        """The source's score of an answer, in [0, 1]."""

    @property
    def has_worked(self) -> bool:
        """Whether it writes solutions itself."""
        return False

    def read(self, problem: Problem, text: str) -> str | None:
        """The answer in a completion, with the tag that its prompt opened; None where it has none."""
        return read_answer(text, problem.answer)

    def grade(self, sample: Sample) -> tuple[float, bool]:
        """(reward, whether it is correct). A truncated sample is never correct: the model did not end it there.

        Raises RewardError where a user's function gives none.
        """
        problem = sample.problem
        correct = not sample.truncated and self.correct(problem, self.read(problem, sample.text))
        return float(correct), correct

    def respond(self, episode: Episode) -> list[Message] | None:
        """What is said to the model after its turn; None ends the episode. Raises RewardError."""
        return None

    def candidate_count(self) -> int | None:
        """Upper bound on the number of distinct candidates; None where unknown."""
        return None

    def all_problems(self) -> list[Problem] | None:
        """All problems of a file; None where problems are generated."""
        return None

    def takes(self, problem: Problem | None, split: Split) -> TypeGuard[Problem]:
        """Whether a candidate is a problem of the split that fits the context."""
        return problem is not None and problem.split == split and (self.fits is None or self.fits(problem))

    def score(self, problem: Problem, answer: str | None) -> float:
        """Score in [0, 1] of an extracted answer; 0 for no answer. Cached."""
        if answer is None or not answer.strip():
            return 0.0
        key = (problem.question, problem.answer, answer)
        score = self._scores.get(key)
        if score is None:
            if len(self._scores) >= 100_000:
                self._scores.clear()
            self._scores[key] = score = min(1.0, max(0.0, float(self.check(problem, answer))))
        return score

    def correct(self, problem: Problem, answer: str | None) -> bool:
        """Whether the answer gets the full score; partial credit is not correct."""
        return self.score(problem, answer) >= 1.0

    def stream(self, split: Split, seed: int, index: int = 0) -> "ProblemStream":
        """Endless problems of a split (a small source repeats); resumes at the `index` of an earlier stream."""
        return ProblemStream(self, split, seed, index)

    def problems(self, split: Split, n: int, seed: int = 0) -> list[Problem]:
        """`n` distinct problems, deterministic in the arguments. Raises UserError when fewer exist."""
        found: dict[tuple[str, str], Problem] = {}  # with the key: where an answer is hidden, all questions are equal
        bound = self.candidate_count()
        index = fresh = 0
        # A source without a known bound is exhausted when this many candidates in a row bring nothing new: of a split
        # that is 0.1 of the keys, the probability to stop wrongly is about e^-5.
        while len(found) < n and index - fresh < 500 + 50 * len(found) and index != bound:
            problem = self.chunked(seed, index)
            index += 1
            if self.takes(problem, split) and (problem.question, problem.key) not in found:
                found[problem.question, problem.key] = problem
                fresh = index
        if len(found) < n:
            raise UserError(
                f"environment {self.family}: {n} distinct {split} problems requested, but only {len(found)} exist; "
                f"ask for fewer or {self.remedy}"
            )
        return list(found.values())

    def chunked(self, seed: int, index: int) -> Problem | None:
        """`candidate`, prefetched one chunk ahead in a thread: some generators take 0.3 s per problem."""
        chunk = index // CHUNK
        for wanted in (chunk, chunk + 1):
            if (seed, wanted) not in self._chunks:
                self._chunks[seed, wanted] = self._prefetcher.submit(self._generate, seed, wanted)
        found = self._chunks[seed, chunk]
        while len(self._chunks) > CACHED_CHUNKS:  # evict the oldest, which may be the current one
            self._chunks.pop(next(iter(self._chunks)))
        return found.result()[index % CHUNK]

    def _generate(self, seed: int, chunk: int) -> list[Problem | None]:
        return [self.candidate(seed, index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]


class Shuffled:
    """Problems of a file or list as candidates: all of them in another order each epoch."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self._orders: dict[tuple[int, int], list[int]] = {}

    def candidate(self, seed: int, index: int) -> Problem:
        epoch, place = divmod(index, len(self.problems))
        if (seed, epoch) not in self._orders:
            order = list(range(len(self.problems)))
            Random(f"{seed}/{epoch}").shuffle(order)
            self._orders = {(seed, epoch): order}  # only the current epoch is kept
        return self.problems[self._orders[seed, epoch][place]]


class ProblemStream(Iterator[Problem]):
    """The problems of one split in order; `index` (of the next candidate) is its complete state."""

    def __init__(self, environment: Environment, split: Split, seed: int, index: int = 0) -> None:
        self.environment, self.seed, self.index = environment, seed, index
        self.split: Split = split

    def __next__(self) -> Problem:
        for _ in range(10_000):
            problem = self.environment.chunked(self.seed, self.index)
            self.index += 1
            if self.environment.takes(problem, self.split):
                return problem
        raise UserError(
            f"environment {self.environment.family}: no {self.split} problem among 10000 candidates; "
            f"{self.environment.remedy}"
        )
