"""Sample the next tokens of a batch's rows from their logits, with each request's own parameters.

Top-k, top-p and min-p: kernels/append_tokens.py and cpu/csrc/sampling.cpp (compiled, for the whole batch), else
kernels/sample.py.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.engine.batch import DecodeBatch
from rorqual.engine.model_runner import DecodeTokens
from rorqual.engine.sampling_params import adjust
from rorqual.engine.sequence import Floats, Integers
from rorqual.kernels import cpu
from rorqual.kernels.allowed_tokens import allowed_tokens, pack
from rorqual.kernels.append_tokens import (
    FILTER_COLUMNS,
    FINISHED,
    LENGTH_REACHED,
    NEEDS_BLOCKS,
    NEEDS_PREPARE,
    STOP_TOKEN,
)
from rorqual.kernels.exact.rows import exact_logprobs
from rorqual.kernels.sample import SamplingFilter, sample, scaled_logprobs


@dataclass
class SamplingStep:
    """The logits [N, V] of a step, and what is sampled from them.

    tokens_per_row [n]: the first of a row's logits follow its newest token, the others its drafts; None: one each.
    With an MTP drafter also the hidden states [N, D] and positions [N] of the N tokens.
    """

    batch: DecodeBatch
    logits: Tensor
    tokens_per_row: Integers | None = None
    states: Tensor | None = None
    positions: Integers | None = None
    exact: bool = False  # log-probabilities by the function that training uses in the exact mode
    finished: dict[int, int] = field(default_factory=dict)  # row → LENGTH_REACHED or STOP_TOKEN
    num_sampled: int = 0
    _accepted: tuple[Integers, Integers, Integers] | None = None  # of every sampled token: row, index into N, token

    def sample(self) -> None:
        """Sample every row's next token, and further ones as long as its draft tokens are accepted."""
        batch, n = self.batch, self.batch.n
        at = np.arange(n)
        if self.tokens_per_row is None:
            self._append(at, self.logits)
            self.num_sampled = n
            return
        before = batch.num_tokens[:n].copy()
        first = self.tokens_per_row.cumsum(0) - self.tokens_per_row
        # Adjusted logits depend on the tokens before them, and the reference takes one token a call: depth by depth.
        slow = batch.needs_adjusting[:n] > 0 if cpu.usable(self.logits) else np.ones(n, dtype=bool)
        if not slow.all():
            self._append(at[~slow], self.logits, np.stack([first[~slow], self.tokens_per_row[~slow]]))
        at, depth = at[slow], 0
        while len(at):
            tokens, ended = self._append(at, self.logits[from_numpy(first[at] + depth)])
            more = (ended == 0) & (self.tokens_per_row[at] > depth + 1)
            at, tokens = at[more], tokens[more]
            if len(at):
                at, depth = at[batch.drafts[at, depth] == tokens], depth + 1
        batch.drafts[:n] = -1
        each = batch.num_tokens[:n] - before
        self.num_sampled = int(each.sum())
        if self.positions is not None:
            row = np.arange(n).repeat(each)
            depth = np.arange(len(row)) - (each.cumsum(0) - each)[row]
            self._accepted = row, first[row] + depth, batch.tokens[row, before[row] + depth]

    def _append(self, at: Integers, logits: Tensor, spans: Integers | None = None) -> tuple[Integers, Integers]:
        tokens, ended, any_ended = sample_and_append(self.batch, at, logits, spans, self.exact)
        if any_ended:
            self.finished |= {int(at[i]): int(ended[i]) for i in ended.nonzero()[0].tolist()}
        return tokens, ended

    def mtp_inputs(self, which: NDArray[np.bool_]) -> tuple[DecodeTokens, Tensor, Integers]:
        """The tokens sampled for the rows `which` (bool [n]), each at the position of the token before it; the hidden
        states at these positions; and the index of each row's last token among them.
        """
        assert self._accepted is not None
        assert self.positions is not None
        assert self.states is not None
        row, index, token = (part[which[self._accepted[0]]] for part in self._accepted)
        last = np.bincount(row, minlength=self.batch.n).cumsum()[which] - 1
        tokens = DecodeTokens(
            from_numpy(token), from_numpy(self.positions[index]), from_numpy(self.batch.block_tables[row])
        )
        return tokens, self.states[from_numpy(index)], last


def sample_and_append(
    batch: DecodeBatch, at: Integers, logits: Tensor, spans: Integers | None = None, exact: bool = False
) -> tuple[Integers, Integers, bool]:
    """Sample a token for the rows `at` [m] from logits [m, V] and append it → the tokens; why each row has finished
    (LENGTH_REACHED or STOP_TOKEN), or 0; and whether any has.

    With spans [2, m], only for compiled kernels and rows without adjusting: several tokens a row, as long as they equal
    its draft tokens (kernels/append_tokens.py); the newest are returned.
    """
    if batch.any_adjusting and (adjusting := batch.needs_adjusting[at].nonzero()[0].tolist()):
        logits = logits.float()
        for i in adjusting:
            _adjust(batch, int(at[i]), logits[i])
        _keep_allowed(batch, at, adjusting, logits)
    if batch.needs_prepare:
        batch.prepare()
    before = batch.num_tokens[at]
    if cpu.usable(logits):
        tokens, ended, flags = batch.append_tokens(at, logits, spans)
        batch.needs_prepare = bool(flags & NEEDS_PREPARE)
        batch.needs_blocks = batch.needs_blocks or bool(flags & NEEDS_BLOCKS)
        any_ended = bool(flags & FINISHED)
    else:
        tokens, ended = sample_and_append_reference(batch, at, logits)
        any_ended = True
    if exact:
        _exact_logprobs(batch, at, logits, before, spans)
    if batch.any_streaming:
        which = batch.streaming[at].nonzero()[0]
        row = at[which]
        for r, first, end in zip(row.tolist(), before[which].tolist(), batch.num_tokens[row].tolist(), strict=True):
            batch.sequences[r].tokens += batch.tokens[r, first:end].tolist()
            batch.sequences[r].logprobs += batch.logprobs[r, first:end].tolist()
    return tokens, ended, any_ended


def _exact_logprobs(batch: DecodeBatch, at: Integers, logits: Tensor, before: Integers, spans: Integers | None) -> None:
    """Record the log-probabilities of the tokens just appended, those after the first `before` [m] of each row, as the
    exact mode computes them.
    """
    each = batch.num_tokens[at] - before
    depth = np.arange(each.sum()) - (each.cumsum(0) - each).repeat(each)
    row, column = at.repeat(each), before.repeat(each) + depth
    source = (np.arange(len(at)) if spans is None else spans[0]).repeat(each) + depth
    temperatures = batch.filter_values[batch.filter_index[row], FILTER_COLUMNS.index("temperature")]
    found = exact_logprobs(logits[from_numpy(source)], from_numpy(batch.tokens[row, column]), from_numpy(temperatures))
    batch.logprobs[row, column] = found.numpy()


def sample_and_append_reference(batch: DecodeBatch, at: Integers, logits: Tensor) -> tuple[Integers, Integers]:
    """Reference of the compiled function (kernels/append_tokens.py)."""
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
    """Sample tokens [m] for the rows `at`, each with its row's next random number → tokens, log-probabilities."""
    uniform = from_numpy(batch.next_uniforms(at)).to(logits.device)
    filters = batch.filters(at)
    if len(filters) == 1:
        found = sample(logits, filters[0][0], uniform)
        return found[0].numpy(force=True), found[1].numpy(force=True)
    tokens, logprobs = np.zeros(len(at), dtype=np.int64), np.zeros(len(at), dtype=np.float32)
    for filter, where in filters:
        here = from_numpy(where).to(logits.device)
        tokens[where], logprobs[where] = (t.numpy(force=True) for t in sample(logits[here], filter, uniform[here]))
    return tokens, logprobs


def _keep_allowed(batch: DecodeBatch, at: Integers, which: list[int], logits: Tensor) -> None:
    """Of the rows at[which] with `record_allowed`, record which tokens their filters keep, and lower the logits [m, V]
    of the others to −∞.
    """
    by_filter: dict[SamplingFilter, list[int]] = {}
    for i in which:
        params = batch.sequences[int(at[i])].request.params
        if params.record_allowed:
            by_filter.setdefault(params.whole_filter, []).append(i)
    for filter, where in by_filter.items():
        here = logits[where]
        allowed = allowed_tokens(here, filter)
        logits[where] = here.masked_fill(~allowed, float("-inf"))
        for i, words in zip(where, pack(allowed), strict=True):
            batch.sequences[int(at[i])].allowed.append(words)


def _adjust(batch: DecodeBatch, row: int, logits: Tensor) -> None:
    """Apply penalties, biases and grammar to one row's logits [V], in place; record top logprobs if requested."""
    sequence = batch.sequences[row]
    params = sequence.request.params
    generated = batch.tokens[row, : batch.num_tokens[row]]
    if params.adjusts:
        logits.copy_(adjust(logits, params, from_numpy(sequence.request.distinct_tokens), from_numpy(generated)))
    if sequence.grammar_state is not None:
        forbidden = sequence.grammar_state.forbidden(generated.tolist(), logits)
        if forbidden is not None:
            logits.masked_fill_(forbidden.to(logits.device), float("-inf"))
    if params.logprobs:
        logp = scaled_logprobs(logits, params.temperature)
        best = logp.topk(min(params.logprobs, len(logp)))
        sequence.top_logprobs.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
