"""The next tokens of rows, from their logits: what a request wishes, applied row by row."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.engine.batch import DecodeBatch, Floats, Integers
from rorqual.engine.model_runner import DecodeTokens
from rorqual.engine.sampling_params import adjust
from rorqual.kernels import cpu
from rorqual.kernels.append_tokens import FINISHED, LENGTH_REACHED, NEEDS_BLOCKS, NEEDS_PREPARE, STOP_TOKEN
from rorqual.kernels.sample import sample, scaled_logprobs


@dataclass
class SamplingStep:
    """What a step has computed for the rows: `per_row` [n] lanes each, one after the other, of which the first read a
    row's newest token and the others its drafts; None: one lane each. logits [N, V]; for a module that guesses further,
    states [N, D] and places [N].
    """

    batch: DecodeBatch
    logits: Tensor
    lanes_per_row: Integers | None = None
    states: Tensor | None = None
    positions: Integers | None = None
    finished: dict[int, int] = field(default_factory=dict)  # rows that ended, and why
    num_sampled: int = 0
    _known: tuple[Integers, Integers, Integers] | None = None  # rows, lanes in order, tokens after them

    def sample(self) -> None:
        """Sample every row's next tokens, as long as its drafts are right."""
        batch, n = self.batch, self.batch.n
        at = np.arange(n)
        if self.lanes_per_row is None:
            self._extend(at, self.logits)
            self.num_sampled = n
            return
        before = batch.num_tokens[:n].copy()
        first = self.lanes_per_row.cumsum(0) - self.lanes_per_row
        # Adjusting logits takes the tokens before, and so does what is not compiled: one token after the other.
        slow = batch.needs_adjusting[:n] > 0 if cpu.usable(self.logits) else np.ones(n, dtype=bool)
        if not slow.all():
            self._extend(at[~slow], self.logits, np.stack([first[~slow], self.lanes_per_row[~slow]]))
        at, depth = at[slow], 0
        while len(at):
            tokens, ended = self._extend(at, self.logits[from_numpy(first[at] + depth)])
            more = (ended == 0) & (self.lanes_per_row[at] > depth + 1)
            at, tokens = at[more], tokens[more]
            if len(at):
                at, depth = at[batch.drafts[at, depth] == tokens], depth + 1
        batch.drafts[:n] = -1
        each = batch.num_tokens[:n] - before
        self.num_sampled = int(each.sum())
        if self.positions is not None:
            row = np.arange(n).repeat(each)
            depth = np.arange(len(row)) - (each.cumsum(0) - each)[row]
            self._known = row, first[row] + depth, batch.tokens[row, before[row] + depth]

    def _extend(self, at: Integers, logits: Tensor, lanes: Integers | None = None) -> tuple[Integers, Integers]:
        tokens, ended, some = sample_and_append(self.batch, at, logits, lanes)
        if some:
            self.finished |= {int(at[i]): int(ended[i]) for i in ended.nonzero()[0].tolist()}
        return tokens, ended

    def accepted(self, which: NDArray[np.bool_]) -> tuple[DecodeTokens, Tensor, Integers]:
        """Of the rows `which` (bool [n]): the tokens made, each in the place of the one before it; the states there;
        and which of these lanes is each row's last.
        """
        assert self._known is not None
        assert self.positions is not None
        assert self.states is not None
        row, lane, token = (part[which[self._known[0]]] for part in self._known)
        last = np.bincount(row, minlength=self.batch.n).cumsum()[which] - 1
        lanes = DecodeTokens(
            from_numpy(token), from_numpy(self.positions[lane]), from_numpy(self.batch.block_tables[row])
        )
        return lanes, self.states[from_numpy(lane)], last


def sample_and_append(
    batch: DecodeBatch, at: Integers, logits: Tensor, lanes: Integers | None = None
) -> tuple[Integers, Integers, bool]:
    """Sample a token for the rows `at` [m] from logits [m, V] and record it → the tokens; why each row has ended
    (LENGTH_REACHED or STOP_TOKEN), or 0; and whether any has. With lanes [2, m], where rows need no adjusting and
    functions are compiled: several tokens, as long as they are a row's drafts (kernels/append_tokens.py); the newest
    are returned.
    """
    if batch.any_adjusting and (special := batch.needs_adjusting[at].nonzero()[0].tolist()):
        logits = logits.float()
        for i in special:
            _adjust(batch, int(at[i]), logits[i])
    if batch.needs_prepare:
        batch.prepare()
    before = batch.num_tokens[at]
    if cpu.usable(logits):
        tokens, ended, see_to = batch.append_tokens(at, logits, lanes)
        batch.needs_prepare, batch.needs_blocks = (
            bool(see_to & NEEDS_PREPARE),
            batch.needs_blocks or bool(see_to & NEEDS_BLOCKS),
        )
        some = bool(see_to & FINISHED)
    else:
        tokens, ended = sample_and_append_reference(batch, at, logits)
        some = True
    if batch.any_streaming:
        which = batch.streaming[at].nonzero()[0]
        row = at[which]
        for r, first, end in zip(row.tolist(), before[which].tolist(), batch.num_tokens[row].tolist(), strict=True):
            batch.sequences[r].tokens += batch.tokens[r, first:end].tolist()
            batch.sequences[r].logprobs += batch.logprobs[r, first:end].tolist()
    return tokens, ended, some


def sample_and_append_reference(batch: DecodeBatch, at: Integers, logits: Tensor) -> tuple[Integers, Integers]:
    """What the compiled function does (kernels/append_tokens.py)."""
    tokens, logprobs = sample_rows(batch, at, logits)
    if batch.any_budget:
        forced = (batch.thinking_ended[at] == 0) & (batch.num_tokens[at] >= batch.budget[at])
        tokens = np.where(forced, batch.think_end_token[at], tokens)
        batch.thinking_ended[at] |= tokens == batch.think_end_token[at]
    batch.record(at, tokens, logprobs)
    stopped = (tokens[:, None] == batch.stop_tokens[at]).any(1)
    return tokens, np.where(
        stopped, STOP_TOKEN, np.where(batch.num_tokens[at] >= batch.max_new_tokens[at], LENGTH_REACHED, 0)
    )


def sample_rows(batch: DecodeBatch, at: Integers, logits: Tensor) -> tuple[Integers, Floats]:
    """Tokens [m] of the rows `at` and their log-probabilities, by each row's own next random number."""
    uniform = from_numpy(batch.next_uniforms(at)).to(logits.device)
    cuts = batch.filters(at)
    if len(cuts) == 1:
        found = sample(logits, cuts[0][0], uniform)
        return found[0].numpy(force=True), found[1].numpy(force=True)
    tokens, logprobs = np.zeros(len(at), dtype=np.int64), np.zeros(len(at), dtype=np.float32)
    for cut, where in cuts:
        here = from_numpy(where).to(logits.device)
        tokens[where], logprobs[where] = (t.numpy(force=True) for t in sample(logits[here], cut, uniform[here]))
    return tokens, logprobs


def _adjust(batch: DecodeBatch, row: int, logits: Tensor) -> None:
    """Penalties, biases and grammar of one row, in place; and the most probable tokens, where they are wanted."""
    running = batch.sequences[row]
    params = running.request.params
    made = batch.tokens[row, : batch.num_tokens[row]]
    if params.adjusts:
        logits.copy_(adjust(logits, params, from_numpy(running.request.distinct_tokens), from_numpy(made)))
    if (
        running.grammar_state is not None
        and (forbidden := running.grammar_state.forbidden(made.tolist(), logits)) is not None
    ):
        logits.masked_fill_(forbidden.to(logits.device), float("-inf"))
    if params.logprobs:
        logp = scaled_logprobs(logits, params.temperature)
        best = logp.topk(min(params.logprobs, len(logp)))
        running.top_logprobs.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
