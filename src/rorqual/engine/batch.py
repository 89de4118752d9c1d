"""The sequences being decoded, as the rows of a few arrays: a step must not touch Python objects one by one.

NumPy's, since an operation on so few numbers takes it a fifth of PyTorch's time, and a step makes fifty.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.block_manager import BLOCK, SPARE
from rorqual.engine.grammar import GrammarState
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import SamplingParams
from rorqual.kernels.append_tokens import AppendTokens
from rorqual.kernels.sample import SamplingFilter

if TYPE_CHECKING:
    from rorqual.engine.speculative import PromptLookupDrafter

MAX_DRAFTS = 12  # guesses a row may have, fewer than a block has tokens
WINDOW = 256  # random numbers drawn at a time
NEVER = 1 << 60

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(eq=False)
class Sequence:
    """One continuation of a request's prompt; `tokens` and `logprobs` stand here whenever it is not in a row."""

    request: "Request"
    index: int  # of the request's n
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # the most probable tokens at every place
    blocks: list[int] = field(default_factory=list)
    generator: np.random.Generator | None = None
    window: Floats | None = None  # [WINDOW] random numbers, from token WINDOW·windows on
    windows: int = 0
    thinking_ended: bool = False  # the thinking has ended
    unopened: bool = False  # nor has it begun
    grammar_state: GrammarState | None = None  # its place in the grammar that the request names
    drafter: "PromptLookupDrafter | None" = None  # its past, where drafts come from there
    finish_reason: str | None = None  # "stop", "length" or "cancelled"


@dataclass(eq=False)
class Request:
    """A prompt to be continued params.n times, or only to be scored."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # tokens an answer may have
    seed: int
    stop_token_ids: tuple[int, ...]
    think_end_token: int | None = None  # given where there is a thinking budget
    streaming: bool = False  # somebody reads the tokens while they are made
    opening: str = ""  # what the prompt has written of the answer's thinking
    unopened: bool = False  # that leaves none open, and a thinking budget holds only if the model does
    grammar_state: GrammarState | None = None
    cached_tokens: int = 0  # tokens of the prompt that lay in the cache already
    prompt_logprobs: PromptLogprobs | None = None  # then there are no samples
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [
            Sequence(
                self,
                j,
                thinking_ended=self.unopened,
                unopened=self.unopened,
                grammar_state=self.grammar_state and self.grammar_state.copy(),
            )
            for j in range(self.params.n)
        ]

    @property
    def done(self) -> bool:
        return (
            all(s.finish_reason for s in self.sequences) if self.prompt_logprobs is None else self.prompt_logprobs.done
        )

    @cached_property
    def distinct_tokens(self) -> Integers:
        """The prompt's different tokens; to look for them at every token would take milliseconds."""
        return np.unique(self.prompt)


class DecodeBatch:
    """Rows 0…n-1 are running."""

    def __init__(self, count: int) -> None:
        self.size, self.n = count, 0
        self.sequences: list[Sequence] = []
        self.numbers = np.zeros((11, count), dtype=np.int64)  # one array, so that a row moves at once
        # The place in the sequence of the token that the next step reads; tokens made; how many may be; …
        self.position, self.num_tokens, self.max_new_tokens, self.last_token = self.numbers[:4]
        self.num_blocks, self.budget, self.think_end_token, self.filter_index = self.numbers[4:8]
        # Flags: the thinking has ended; logits are to be adjusted or reported; somebody reads along.
        self.thinking_ended, self.needs_adjusting, self.streaming = self.numbers[8:]
        # Whether any row may have a budget for thinking, be special, or be watched: to look costs 2 % of a small step.
        self.any_budget = self.any_adjusting = self.any_streaming = False
        # Whether some row may lack room for its next token or a random number; or a block: these are seldom, too.
        self.needs_prepare = self.needs_blocks = True
        self.uniforms = np.zeros((count, WINDOW), dtype=np.float32)
        self.stop_tokens = np.full((count, 1), -1)
        self.block_tables = np.full((count, 8), SPARE, dtype=np.int32)
        self.tokens = np.zeros((count, 256), dtype=np.int64)
        self.logprobs = np.zeros((count, 256), dtype=np.float32)
        self.drafts = np.full((count, MAX_DRAFTS), -1)  # guesses at the tokens after the last one; -1: none
        self.filter_values = np.zeros((count + 2, 4), dtype=np.float32)
        self._filters: dict[SamplingFilter, int] = {}
        self._append_tokens: AppendTokens | None = None

    @property
    def append_tokens(self) -> AppendTokens:
        if self._append_tokens is None:
            self._append_tokens = AppendTokens(
                self.numbers, self.filter_values, self.uniforms, self.stop_tokens, self.tokens, self.logprobs,
                self.drafts, BLOCK,
            )  # fmt: skip
        return self._append_tokens

    def filters(self, at: Integers) -> list[tuple[SamplingFilter, Integers]]:
        """The ways to sample, and to which of the rows `at` each applies."""
        by_number = list(self._filters)
        if len(by_number) == 1:
            return [(by_number[0], np.arange(len(at)))]
        kinds = self.filter_index[at]
        return [(by_number[k], (kinds == k).nonzero()[0]) for k in np.unique(kinds).tolist()]

    def add(self, sample: Sequence, place: int) -> None:
        """Give a sample the next row; its next token has number len(sample.tokens) and stands at `place`."""
        row, request, params = self.n, sample.request, sample.request.params
        self.n += 1
        self.sequences.append(sample)
        self.position[row], self.num_tokens[row] = place, len(sample.tokens)
        self.max_new_tokens[row], self.thinking_ended[row] = request.max_new_tokens, sample.thinking_ended
        self.budget[row] = NEVER if request.think_end_token is None else min(params.thinking_budget or 0, NEVER)
        self.think_end_token[row] = -1 if request.think_end_token is None else request.think_end_token
        if len(self._filters) > self.size:  # those of sequences long gone
            self._filters = {}
            for i, running in enumerate(self.sequences[:row]):
                self.filter_index[i] = self._filter_number(running.request.params.cut)
        self.filter_index[row] = self._filter_number(params.cut)
        self.needs_adjusting[row] = params.adjusts or params.logprobs > 0 or sample.grammar_state is not None
        self.streaming[row] = request.streaming
        self.any_budget |= request.think_end_token is not None
        self.any_adjusting |= bool(self.needs_adjusting[row])
        self.any_streaming |= request.streaming
        self.drafts[row] = -1
        self.needs_prepare = self.needs_blocks = True
        self._widen("stop_tokens", len(request.stop_token_ids), -1)
        self.stop_tokens[row] = -1
        self.stop_tokens[row, : len(request.stop_token_ids)] = request.stop_token_ids
        self.set_blocks(row)
        self._widen("tokens", len(sample.tokens) + 1, 0)
        self._widen("logprobs", len(sample.tokens) + 1, 0)
        if sample.tokens:
            self.tokens[row, : len(sample.tokens)] = sample.tokens
            self.logprobs[row, : len(sample.tokens)] = sample.logprobs
        if sample.generator is None:
            # Philox: its key is the seed, all of it, where torch's generator would look at the lower 32 bits only.
            # Of a list with a number beyond 2^63 NumPy makes floats, and seeds fall together.
            key = np.array([request.seed % (1 << 64), sample.index], dtype=np.uint64)
            sample.generator = np.random.Generator(np.random.Philox(key=key))
        if sample.window is None:
            sample.window = _next_window(sample.generator)
        self.uniforms[row] = sample.window

    def _filter_number(self, cut: SamplingFilter) -> int:
        number = self._filters.setdefault(cut, len(self._filters))
        self.filter_values[number] = cut.temperature, cut.top_p, cut.top_k, cut.min_p
        return number

    def set_blocks(self, row: int) -> None:
        blocks = self.sequences[row].blocks
        self._widen("block_tables", len(blocks), SPARE)
        self.block_tables[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)

    def add_blocks(self, rows: list[int], blocks: list[int]) -> None:
        """One block more for each of some rows."""
        held = self.num_blocks[rows]
        self._widen("block_tables", int(held.max()) + 1, SPARE)
        self.block_tables[rows, held] = blocks
        self.num_blocks[rows] = held + 1
        for row, block in zip(rows, blocks, strict=True):
            self.sequences[row].blocks.append(block)

    def prepare(self) -> None:
        """Room for every row's next tokens, and a random number for the first of them."""
        count = self.num_tokens[: self.n]
        longest = int(count.max()) + 1 + MAX_DRAFTS
        self._widen("tokens", longest, 0)
        self._widen("logprobs", longest, 0)
        for row in ((count % WINDOW == 0) & (count > 0)).nonzero()[0].tolist():
            sample = self.sequences[row]
            assert sample.generator is not None
            if sample.windows != int(count[row]) // WINDOW:
                sample.windows = int(count[row]) // WINDOW
                sample.window = _next_window(sample.generator)
                self.uniforms[row] = sample.window
        self.needs_prepare = False

    def next_uniforms(self, at: Integers) -> Floats:
        """One number in [0, 1) for each of the rows `at`; the next for every token."""
        if self.needs_prepare:
            self.prepare()
        return self.uniforms[at, self.num_tokens[at] % WINDOW]

    def record(self, at: Integers, tokens: Integers, logprobs: Floats) -> None:
        """The next token of the rows `at`."""
        count = self.num_tokens[at]
        self.tokens[at, count] = tokens
        self.logprobs[at, count] = logprobs
        self.last_token[at] = tokens
        self.num_tokens[at] = count + 1
        self.position[at] += 1
        self.needs_prepare = self.needs_blocks = True

    def save(self, row: int) -> Sequence:
        """Write what a row has made into its sample."""
        sample, count = self.sequences[row], int(self.num_tokens[row])
        sample.tokens, sample.logprobs = self.tokens[row, :count].tolist(), self.logprobs[row, :count].tolist()
        sample.thinking_ended = bool(self.thinking_ended[row])
        return sample

    def open_thinking(self, sample: Sequence) -> None:
        """What its budget counts has begun."""
        sample.unopened, self.thinking_ended[self.sequences.index(sample)] = False, 0

    def remove(self, gone: list[int]) -> None:
        """Free rows; the last ones move into the holes."""
        alive = np.ones(self.n, dtype=bool)
        alive[gone] = False
        left = self.n - len(gone)
        holes = (~alive[:left]).nonzero()[0]
        if len(holes):
            movers = left + alive[left:].nonzero()[0]
            self.numbers[:, holes] = self.numbers[:, movers]
            for state in (self.uniforms, self.stop_tokens, self.block_tables, self.tokens, self.logprobs, self.drafts):
                state[holes] = state[movers]
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                self.sequences[hole] = self.sequences[mover]
        del self.sequences[left:]
        self.n = left
        if left == 0:
            self.any_budget = self.any_adjusting = self.any_streaming = False

    def _widen(self, name: str, width: int, empty: int) -> None:
        old = getattr(self, name)
        if width > old.shape[1]:
            wider = np.full((self.size, max(width, 2 * old.shape[1])), empty, dtype=old.dtype)
            wider[:, : old.shape[1]] = old
            setattr(self, name, wider)
            self._append_tokens = None


def _next_window(generator: np.random.Generator) -> Floats:
    return generator.random(WINDOW, dtype=np.float32)
