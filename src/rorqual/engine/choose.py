"""The next tokens of rows, from their logits: what a request wishes, applied row by row."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.engine.forward import Lanes
from rorqual.engine.rows import Floats, Integers, Rows
from rorqual.engine.sampler import adjust
from rorqual.kernels import cpu
from rorqual.kernels.draw import draw, log_shares
from rorqual.kernels.extend import ENDED, LACKING, LENGTH, TOKEN, UNREADY


@dataclass
class Turn:
    """What a step has computed for the rows: `per_row` [n] lanes each, one after the other, of which the first read a
    row's newest token and the others its drafts; None: one lane each. logits [N, V]; for a module that guesses further,
    states [N, D] and places [N].
    """

    rows: Rows
    logits: Tensor
    per_row: Integers | None = None
    states: Tensor | None = None
    places: Integers | None = None
    finished: dict[int, int] = field(default_factory=dict)  # rows that ended, and why
    made: int = 0
    _known: tuple[Integers, Integers, Integers] | None = None  # rows, lanes in order, tokens after them

    def take(self) -> None:
        """Sample every row's next tokens, as long as its drafts are right."""
        rows, n = self.rows, self.rows.n
        at = np.arange(n)
        if self.per_row is None:
            self._extend(at, self.logits)
            self.made = n
            return
        before = rows.count[:n].copy()
        first = self.per_row.cumsum(0) - self.per_row
        # Adjusting logits takes the tokens before, and so does what is not compiled: one token after the other.
        slow = rows.special[:n] > 0 if cpu.usable(self.logits) else np.ones(n, dtype=bool)
        if not slow.all():
            self._extend(at[~slow], self.logits, np.stack([first[~slow], self.per_row[~slow]]))
        at, depth = at[slow], 0
        while len(at):
            tokens, ended = self._extend(at, self.logits[from_numpy(first[at] + depth)])
            more = (ended == 0) & (self.per_row[at] > depth + 1)
            at, tokens = at[more], tokens[more]
            if len(at):
                at, depth = at[rows.drafts[at, depth] == tokens], depth + 1
        rows.drafts[:n] = -1
        each = rows.count[:n] - before
        self.made = int(each.sum())
        if self.places is not None:
            row = np.arange(n).repeat(each)
            depth = np.arange(len(row)) - (each.cumsum(0) - each)[row]
            self._known = row, first[row] + depth, rows.tokens[row, before[row] + depth]

    def _extend(self, at: Integers, logits: Tensor, lanes: Integers | None = None) -> tuple[Integers, Integers]:
        tokens, ended, some = extend(self.rows, at, logits, lanes)
        if some:
            self.finished |= {int(at[i]): int(ended[i]) for i in ended.nonzero()[0].tolist()}
        return tokens, ended

    def read(self, which: NDArray[np.bool_]) -> tuple[Lanes, Tensor, Integers]:
        """Of the rows `which` (bool [n]): the tokens made, each in the place of the one before it; the states there;
        and which of these lanes is each row's last.
        """
        assert self._known is not None
        assert self.places is not None
        assert self.states is not None
        row, lane, token = (part[which[self._known[0]]] for part in self._known)
        last = np.bincount(row, minlength=self.rows.n).cumsum()[which] - 1
        lanes = Lanes(from_numpy(token), from_numpy(self.places[lane]), from_numpy(self.rows.tables[row]))
        return lanes, self.states[from_numpy(lane)], last


def extend(rows: Rows, at: Integers, logits: Tensor, lanes: Integers | None = None) -> tuple[Integers, Integers, bool]:
    """Sample a token for the rows `at` [m] from logits [m, V] and record it → the tokens; why each row has ended
    (LENGTH or TOKEN), or 0; and whether any has. With lanes [2, m], where rows are not special and functions are
    compiled: several tokens, as long as they are a row's drafts (kernels/extend.py); the newest are returned.
    """
    if rows.any_special and (special := rows.special[at].nonzero()[0].tolist()):
        logits = logits.float()
        for i in special:
            _adjust(rows, int(at[i]), logits[i])
    if rows.unready:
        rows.prepare()
    before = rows.count[at]
    if cpu.usable(logits):
        tokens, ended, see_to = rows.extend(at, logits, lanes)
        rows.unready, rows.lacking = bool(see_to & UNREADY), rows.lacking or bool(see_to & LACKING)
        some = bool(see_to & ENDED)
    else:
        tokens, ended = extend_reference(rows, at, logits)
        some = True
    if rows.any_watched:
        which = rows.watched[at].nonzero()[0]
        row = at[which]
        for r, first, end in zip(row.tolist(), before[which].tolist(), rows.count[row].tolist(), strict=True):
            rows.samples[r].tokens += rows.tokens[r, first:end].tolist()
            rows.samples[r].logprobs += rows.logprobs[r, first:end].tolist()
    return tokens, ended, some


def extend_reference(rows: Rows, at: Integers, logits: Tensor) -> tuple[Integers, Integers]:
    """What the compiled function does (kernels/extend.py)."""
    tokens, logprobs = draw_at(rows, at, logits)
    if rows.any_budget:
        forced = (rows.closed[at] == 0) & (rows.count[at] >= rows.budget[at])
        tokens = np.where(forced, rows.think_end[at], tokens)
        rows.closed[at] |= tokens == rows.think_end[at]
    rows.record(at, tokens, logprobs)
    stopped = (tokens[:, None] == rows.stops[at]).any(1)
    return tokens, np.where(stopped, TOKEN, np.where(rows.count[at] >= rows.limit[at], LENGTH, 0))


def draw_at(rows: Rows, at: Integers, logits: Tensor) -> tuple[Integers, Floats]:
    """Tokens [m] of the rows `at` and their log-probabilities, by each row's own next random number."""
    uniform = from_numpy(rows.draws(at)).to(logits.device)
    cuts = rows.cuts(at)
    if len(cuts) == 1:
        found = draw(logits, cuts[0][0], uniform)
        return found[0].numpy(force=True), found[1].numpy(force=True)
    tokens, logprobs = np.zeros(len(at), dtype=np.int64), np.zeros(len(at), dtype=np.float32)
    for cut, where in cuts:
        here = from_numpy(where).to(logits.device)
        tokens[where], logprobs[where] = (t.numpy(force=True) for t in draw(logits[here], cut, uniform[here]))
    return tokens, logprobs


def _adjust(rows: Rows, row: int, logits: Tensor) -> None:
    """Penalties, biases and grammar of one row, in place; and the most probable tokens, where they are wanted."""
    running = rows.samples[row]
    params = running.request.params
    made = rows.tokens[row, : rows.count[row]]
    if params.adjusts:
        logits.copy_(adjust(logits, params, from_numpy(running.request.known), from_numpy(made)))
    if running.guide is not None and (forbidden := running.guide.forbidden(made.tolist(), logits)) is not None:
        logits.masked_fill_(forbidden.to(logits.device), float("-inf"))
    if params.logprobs:
        logp = log_shares(logits, params.temperature)
        best = logp.topk(min(params.logprobs, len(logp)))
        running.top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
