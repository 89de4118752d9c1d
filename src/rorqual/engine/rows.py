"""The sequences being decoded, as the rows of a few arrays: a step must not touch Python objects one by one.

NumPy's, since an operation on so few numbers takes it a fifth of PyTorch's time, and a step makes fifty.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.blocks import BLOCK, SPARE
from rorqual.engine.grammar import Guide
from rorqual.engine.sampler import SamplingParams
from rorqual.engine.score import Scoring
from rorqual.kernels.draw import Cut
from rorqual.kernels.extend import Extend

if TYPE_CHECKING:
    from rorqual.engine.speculate import Lookup

DRAFTS = 12  # guesses a row may have, fewer than a block has tokens
WINDOW = 256  # random numbers drawn at a time
NEVER = 1 << 60

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(eq=False)
class Sample:
    """One continuation of a request's prompt; `tokens` and `logprobs` stand here whenever it is not in a row."""

    request: "Request"
    number: int  # of the request's n
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # the most probable tokens at every place
    blocks: list[int] = field(default_factory=list)
    generator: np.random.Generator | None = None
    window: Floats | None = None  # [WINDOW] random numbers, from token WINDOW·windows on
    windows: int = 0
    closed: bool = False  # the thinking has ended
    silent: bool = False  # nor has it begun
    guide: Guide | None = None  # its place in the grammar that the request names
    lookup: "Lookup | None" = None  # its past, where drafts come from there
    finish: str | None = None  # "stop", "length" or "cancelled"


@dataclass(eq=False)
class Request:
    """A prompt to be continued params.n times, or only to be scored."""

    prompt: tuple[int, ...]
    params: SamplingParams
    room: int  # tokens an answer may have
    seed: int
    stop_ids: tuple[int, ...]
    think_end: int | None = None  # given where there is a thinking budget
    watched: bool = False  # somebody reads the tokens while they are made
    opening: str = ""  # what the prompt has written of the answer's thinking
    silent: bool = False  # that leaves none open, and a thinking budget holds only if the model does
    guide: Guide | None = None
    cached: int = 0  # tokens of the prompt that lay in the cache already
    scoring: Scoring | None = None  # then there are no samples
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = [
            Sample(self, j, closed=self.silent, silent=self.silent, guide=self.guide and self.guide.copy())
            for j in range(self.params.n)
        ]

    @property
    def done(self) -> bool:
        return all(s.finish for s in self.samples) if self.scoring is None else self.scoring.done

    @cached_property
    def known(self) -> Integers:
        """The prompt's different tokens; to look for them at every token would take milliseconds."""
        return np.unique(self.prompt)


class Rows:
    """Rows 0…n-1 are running."""

    def __init__(self, count: int) -> None:
        self.size, self.n = count, 0
        self.samples: list[Sample] = []
        self.numbers = np.zeros((11, count), dtype=np.int64)  # one array, so that a row moves at once
        # The place in the sequence of the token that the next step reads; tokens made; how many may be; …
        self.place, self.count, self.limit, self.last = self.numbers[:4]
        self.held, self.budget, self.think_end, self.cut = self.numbers[4:8]
        # Flags: the thinking has ended; logits are to be adjusted or reported; somebody reads along.
        self.closed, self.special, self.watched = self.numbers[8:]
        # Whether any row may have a budget for thinking, be special, or be watched: to look costs 2 % of a small step.
        self.any_budget = self.any_special = self.any_watched = False
        # Whether some row may lack room for its next token or a random number; or a block: these are seldom, too.
        self.unready = self.lacking = True
        self.uniform = np.zeros((count, WINDOW), dtype=np.float32)
        self.stops = np.full((count, 1), -1)
        self.tables = np.full((count, 8), SPARE, dtype=np.int32)
        self.tokens = np.zeros((count, 256), dtype=np.int64)
        self.logprobs = np.zeros((count, 256), dtype=np.float32)
        self.drafts = np.full((count, DRAFTS), -1)  # guesses at the tokens after the last one; -1: none
        self.cut_numbers = np.zeros((count + 2, 4), dtype=np.float32)
        self._cuts: dict[Cut, int] = {}
        self._extend: Extend | None = None

    @property
    def extend(self) -> Extend:
        if self._extend is None:
            self._extend = Extend(
                self.numbers, self.cut_numbers, self.uniform, self.stops, self.tokens, self.logprobs, self.drafts,
                BLOCK,
            )  # fmt: skip
        return self._extend

    def cuts(self, at: Integers) -> list[tuple[Cut, Integers]]:
        """The ways to sample, and to which of the rows `at` each applies."""
        by_number = list(self._cuts)
        if len(by_number) == 1:
            return [(by_number[0], np.arange(len(at)))]
        kinds = self.cut[at]
        return [(by_number[k], (kinds == k).nonzero()[0]) for k in np.unique(kinds).tolist()]

    def add(self, sample: Sample, place: int) -> None:
        """Give a sample the next row; its next token has number len(sample.tokens) and stands at `place`."""
        row, request, params = self.n, sample.request, sample.request.params
        self.n += 1
        self.samples.append(sample)
        self.place[row], self.count[row] = place, len(sample.tokens)
        self.limit[row], self.closed[row] = request.room, sample.closed
        self.budget[row] = NEVER if request.think_end is None else min(params.thinking_budget or 0, NEVER)
        self.think_end[row] = -1 if request.think_end is None else request.think_end
        if len(self._cuts) > self.size:  # those of sequences long gone
            self._cuts = {}
            for i, running in enumerate(self.samples[:row]):
                self.cut[i] = self._number(running.request.params.cut)
        self.cut[row] = self._number(params.cut)
        self.special[row] = params.adjusts or params.logprobs > 0 or sample.guide is not None
        self.watched[row] = request.watched
        self.any_budget |= request.think_end is not None
        self.any_special |= bool(self.special[row])
        self.any_watched |= request.watched
        self.drafts[row] = -1
        self.unready = self.lacking = True
        self._widen("stops", len(request.stop_ids), -1)
        self.stops[row] = -1
        self.stops[row, : len(request.stop_ids)] = request.stop_ids
        self.set_blocks(row)
        self._widen("tokens", len(sample.tokens) + 1, 0)
        self._widen("logprobs", len(sample.tokens) + 1, 0)
        if sample.tokens:
            self.tokens[row, : len(sample.tokens)] = sample.tokens
            self.logprobs[row, : len(sample.tokens)] = sample.logprobs
        if sample.generator is None:
            # Philox: its key is the seed, all of it, where torch's generator would look at the lower 32 bits only.
            # Of a list with a number beyond 2^63 NumPy makes floats, and seeds fall together.
            key = np.array([request.seed % (1 << 64), sample.number], dtype=np.uint64)
            sample.generator = np.random.Generator(np.random.Philox(key=key))
        if sample.window is None:
            sample.window = _next_window(sample.generator)
        self.uniform[row] = sample.window

    def _number(self, cut: Cut) -> int:
        number = self._cuts.setdefault(cut, len(self._cuts))
        self.cut_numbers[number] = cut.temperature, cut.top_p, cut.top_k, cut.min_p
        return number

    def set_blocks(self, row: int) -> None:
        blocks = self.samples[row].blocks
        self._widen("tables", len(blocks), SPARE)
        self.tables[row, : len(blocks)] = blocks
        self.held[row] = len(blocks)

    def add_blocks(self, rows: list[int], blocks: list[int]) -> None:
        """One block more for each of some rows."""
        held = self.held[rows]
        self._widen("tables", int(held.max()) + 1, SPARE)
        self.tables[rows, held] = blocks
        self.held[rows] = held + 1
        for row, block in zip(rows, blocks, strict=True):
            self.samples[row].blocks.append(block)

    def prepare(self) -> None:
        """Room for every row's next tokens, and a random number for the first of them."""
        count = self.count[: self.n]
        longest = int(count.max()) + 1 + DRAFTS
        self._widen("tokens", longest, 0)
        self._widen("logprobs", longest, 0)
        for row in ((count % WINDOW == 0) & (count > 0)).nonzero()[0].tolist():
            sample = self.samples[row]
            assert sample.generator is not None
            if sample.windows != int(count[row]) // WINDOW:
                sample.windows = int(count[row]) // WINDOW
                sample.window = _next_window(sample.generator)
                self.uniform[row] = sample.window
        self.unready = False

    def draws(self, at: Integers) -> Floats:
        """One number in [0, 1) for each of the rows `at`; the next for every token."""
        if self.unready:
            self.prepare()
        return self.uniform[at, self.count[at] % WINDOW]

    def record(self, at: Integers, tokens: Integers, logprobs: Floats) -> None:
        """The next token of the rows `at`."""
        count = self.count[at]
        self.tokens[at, count] = tokens
        self.logprobs[at, count] = logprobs
        self.last[at] = tokens
        self.count[at] = count + 1
        self.place[at] += 1
        self.unready = self.lacking = True

    def save(self, row: int) -> Sample:
        """Write what a row has made into its sample."""
        sample, count = self.samples[row], int(self.count[row])
        sample.tokens, sample.logprobs = self.tokens[row, :count].tolist(), self.logprobs[row, :count].tolist()
        sample.closed = bool(self.closed[row])
        return sample

    def begin_thinking(self, sample: Sample) -> None:
        """What its budget counts has begun."""
        sample.silent, self.closed[self.samples.index(sample)] = False, 0

    def remove(self, gone: list[int]) -> None:
        """Free rows; the last ones move into the holes."""
        alive = np.ones(self.n, dtype=bool)
        alive[gone] = False
        left = self.n - len(gone)
        holes = (~alive[:left]).nonzero()[0]
        if len(holes):
            movers = left + alive[left:].nonzero()[0]
            self.numbers[:, holes] = self.numbers[:, movers]
            for state in (self.uniform, self.stops, self.tables, self.tokens, self.logprobs, self.drafts):
                state[holes] = state[movers]
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                self.samples[hole] = self.samples[mover]
        del self.samples[left:]
        self.n = left
        if left == 0:
            self.any_budget = self.any_special = self.any_watched = False

    def _widen(self, name: str, width: int, empty: int) -> None:
        old = getattr(self, name)
        if width > old.shape[1]:
            wider = np.full((self.size, max(width, 2 * old.shape[1])), empty, dtype=old.dtype)
            wider[:, : old.shape[1]] = old
            setattr(self, name, wider)
            self._extend = None


def _next_window(generator: np.random.Generator) -> Floats:
    return generator.random(WINDOW, dtype=np.float32)
