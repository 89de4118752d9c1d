"""The decode batch: sequences as rows of a few arrays, so that a step needs no Python loop over them.

NumPy arrays: an operation on so few numbers takes NumPy a fifth of PyTorch's time, and a step makes fifty.
"""

import numpy as np

from rorqual.engine.block_manager import BLOCK, NULL_BLOCK
from rorqual.engine.sequence import Floats, Integers, Sequence
from rorqual.kernels.append_tokens import NUMBERS, AppendTokens
from rorqual.kernels.sample import SamplingFilter

MAX_DRAFTS = 12  # draft tokens a row, fewer than a block has tokens
WINDOW = 256  # random numbers drawn at a time, one for each token
NEVER = 1 << 60


class DecodeBatch:
    """Up to `count` running sequences in rows 0…n-1."""

    def __init__(self, count: int) -> None:
        self.size, self.n = count, 0
        self.sequences: list[Sequence] = []
        self.numbers = np.zeros((len(NUMBERS), count), dtype=np.int64)  # so that a row moves in one operation
        # Position of the next step's input token; tokens generated; their limit; the newest one.
        self.position, self.num_tokens, self.max_new_tokens, self.last_token = self.numbers[:4]
        self.num_blocks, self.budget, self.think_end_token, self.filter_index = self.numbers[4:8]
        # Flags; needs_adjusting: logits have penalties, biases or a grammar, or top logprobs or the
        # allowed tokens are reported.
        self.thinking_ended, self.needs_adjusting, self.streaming = self.numbers[8:]
        # Whether any row has a thinking budget or one of these flags: scanning the rows costs 2 % of a small step.
        self.any_budget = self.any_adjusting = self.any_streaming = False
        # Whether some row may lack array space or a random number for its next token; or a block. Both are rare.
        self.needs_prepare = self.needs_blocks = True
        self.uniforms = np.zeros((count, WINDOW), dtype=np.float32)
        self.stop_tokens = np.full((count, 1), -1)
        self.block_tables = np.full((count, 8), NULL_BLOCK, dtype=np.int32)
        self.tokens = np.zeros((count, 256), dtype=np.int64)
        self.logprobs = np.zeros((count, 256), dtype=np.float32)
        self.drafts = np.full((count, MAX_DRAFTS), -1)  # draft tokens after the newest one; -1: none
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
        """The distinct filters of the rows `at`, each with its indices into `at`."""
        filters = list(self._filters)
        if len(filters) == 1:
            return [(filters[0], np.arange(len(at)))]
        indices = self.filter_index[at]
        return [(filters[i], (indices == i).nonzero()[0]) for i in np.unique(indices).tolist()]

    def add(self, sequence: Sequence, position: int) -> None:
        """Give a sequence the next row. position: of its newest token, which may be the prompt's last."""
        row, request, params = self.n, sequence.request, sequence.request.params
        self.n += 1
        self.sequences.append(sequence)
        self.position[row], self.num_tokens[row] = position, len(sequence.tokens)
        self.max_new_tokens[row], self.thinking_ended[row] = request.max_new_tokens, sequence.thinking_ended
        self.budget[row] = NEVER if request.think_end_token is None else min(params.thinking_budget or 0, NEVER)
        self.think_end_token[row] = -1 if request.think_end_token is None else request.think_end_token
        if len(self._filters) > self.size:  # drop those of finished sequences
            self._filters = {}
            for i, running in enumerate(self.sequences[:row]):
                self.filter_index[i] = self._filter_number(running.request.params.filter)
        self.filter_index[row] = self._filter_number(params.filter)
        self.needs_adjusting[row] = (
            params.adjusts or params.logprobs > 0 or params.record_allowed or sequence.grammar_state is not None
        )
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
        self._widen("tokens", len(sequence.tokens) + 1, 0)
        self._widen("logprobs", len(sequence.tokens) + 1, 0)
        if sequence.tokens:
            self.tokens[row, : len(sequence.tokens)] = sequence.tokens
            self.logprobs[row, : len(sequence.tokens)] = sequence.logprobs
        if sequence.generator is None:
            # Philox's key is the whole seed; torch's generator would use the lower 32 bits only.
            # dtype: from a list with a number beyond 2^63 NumPy makes floats, and seeds collide.
            key = np.array([request.seed % (1 << 64), sequence.index], dtype=np.uint64)
            sequence.generator = np.random.Generator(np.random.Philox(key=key))
        if sequence.uniforms is None:
            sequence.uniforms = _next_uniforms(sequence.generator)
        self.uniforms[row] = sequence.uniforms

    def _filter_number(self, filter: SamplingFilter) -> int:
        number = self._filters.setdefault(filter, len(self._filters))
        self.filter_values[number] = filter.temperature, filter.top_p, filter.top_k, filter.min_p
        return number

    def set_blocks(self, row: int) -> None:
        blocks = self.sequences[row].blocks
        self._widen("block_tables", len(blocks), NULL_BLOCK)
        self.block_tables[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)

    def add_blocks(self, rows: list[int], blocks: list[int]) -> None:
        """Append a block to each of `rows`."""
        count = self.num_blocks[rows]
        self._widen("block_tables", int(count.max()) + 1, NULL_BLOCK)
        self.block_tables[rows, count] = blocks
        self.num_blocks[rows] = count + 1
        for row, block in zip(rows, blocks, strict=True):
            self.sequences[row].blocks.append(block)

    def prepare(self) -> None:
        """Make space for every row's next tokens, and a random number for the first of them."""
        count = self.num_tokens[: self.n]
        longest = int(count.max()) + 1 + MAX_DRAFTS
        self._widen("tokens", longest, 0)
        self._widen("logprobs", longest, 0)
        for row in ((count % WINDOW == 0) & (count > 0)).nonzero()[0].tolist():
            sequence = self.sequences[row]
            assert sequence.generator is not None
            if sequence.window_index != int(count[row]) // WINDOW:
                sequence.window_index = int(count[row]) // WINDOW
                sequence.uniforms = _next_uniforms(sequence.generator)
                self.uniforms[row] = sequence.uniforms
        self.needs_prepare = False

    def next_uniforms(self, at: Integers) -> Floats:
        """A random number in [0, 1) for the next token of each of the rows `at`."""
        if self.needs_prepare:
            self.prepare()
        return self.uniforms[at, self.num_tokens[at] % WINDOW]

    def record(self, at: Integers, tokens: Integers, logprobs: Floats) -> None:
        """Append a token to each of the rows `at`."""
        count = self.num_tokens[at]
        self.tokens[at, count] = tokens
        self.logprobs[at, count] = logprobs
        self.last_token[at] = tokens
        self.num_tokens[at] = count + 1
        self.position[at] += 1
        self.needs_prepare = self.needs_blocks = True

    def save(self, row: int) -> Sequence:
        """Write a row's tokens and state into its sequence."""
        sequence, count = self.sequences[row], int(self.num_tokens[row])
        sequence.tokens, sequence.logprobs = self.tokens[row, :count].tolist(), self.logprobs[row, :count].tolist()
        sequence.thinking_ended = bool(self.thinking_ended[row])
        return sequence

    def open_thinking(self, row: int) -> None:
        """The model has opened its thinking; from here its budget applies."""
        self.sequences[row].unopened, self.thinking_ended[row] = False, 0

    def remove(self, rows: list[int]) -> None:
        """Free rows; the last ones move into the holes."""
        alive = np.ones(self.n, dtype=bool)
        alive[rows] = False
        left = self.n - len(rows)
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


def _next_uniforms(generator: np.random.Generator) -> Floats:
    return generator.random(WINDOW, dtype=np.float32)
