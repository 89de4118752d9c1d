"""Drafts: guesses at the next tokens, which one pass of the network checks all together (Leviathan et al. 2023).

A draft changes what is computed, never what is said. Every token is sampled from the network's own logits with its own
random number, as without drafts; a draft that is the very token sampled has saved a pass. So the distribution is kept,
and the same seed gives the same text with drafts and without.
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.engine.batch import MAX_DRAFTS, WINDOW, DecodeBatch, Integers
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.fused_cpu import fused_mtp_step
from rorqual.engine.model_runner import DecodeTokens, PrefillChunk
from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache, PrefillSlice
from rorqual.engine.sampling import sample_rows
from rorqual.kernels.linear import linear
from rorqual.model import Transformer

Way = Literal["mtp", "ngram"]  # where drafts come from
MOST = 16  # sequences up to which a module's guesses cost less than a pass: beyond, products are bound by arithmetic
LANES = 384  # a step may have with drafts, since logits take memory; more sequences get none
GRAMS = (4, 3)  # tokens in common that make a look-up worth trying, the longest first
LEARNING = 0.3  # how far one guess changes what the next are thought of
# What a draft's lane costs of what a sequence's pass does: nearly nothing for a single sequence, since reading the
# weights takes as long as computing some ten lanes, and COST for many (SmolLM2 on two cores; 0.4 to 1 differ by 2 %).
COST, WEIGHTS_TAKE = 0.8, 12


class MTPDrafter:
    """The network's own multi-token module guesses one token further (V3 §2.2, §5.4.3).

    It keeps a past of its own, in the cache's last layer: what it read in place i is the network's state there and the
    token after it. It draws with the random number that will draw the token itself, so that where the two distributions
    agree, so do the draws.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self.direct = fused_mtp_step(model, cache)

    def read(self, pieces: list[PrefillChunk], states: Tensor) -> None:
        """Pieces of prompts, with the network's states [M, D] of all their tokens."""
        known = [len(p.following) for p in pieces]
        if not sum(known):
            return
        prompts = [PrefillSlice(p.start, n, p.blocks) for p, n in zip(pieces, known, strict=True) if n]
        step = KVCacheView(self.cache, torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.long), prompts)
        parts = states.split([len(p.tokens) for p in pieces])
        self._run(
            torch.cat([part[:n] for part, n in zip(parts, known, strict=True)]),
            torch.cat([p.following for p in pieces]), step,
        )  # fmt: skip

    def propose(self, batch: DecodeBatch, at: Integers, lanes: DecodeTokens, states: Tensor, last: Integers) -> None:
        """lanes: the tokens that the rows `at` [m] have made, each in the place before its own, with the network's
        states [N, D] there; `last` [m]: each row's newest.
        """
        if self.direct is not None:
            lengths = (lanes.positions + 1).to(torch.int32)
            wanted = from_numpy(last).to(torch.int32)
            logits = self.direct(lanes.tokens, lanes.block_tables, lengths, wanted, states)[0]
        else:
            out = self._run(states, lanes.tokens, KVCacheView(self.cache, lanes.block_tables, lanes.positions, []))
            logits = linear(out[from_numpy(last).to(out.device)], self.model.head_weight)
        tokens, _ = sample_rows(batch, at, logits)
        batch.drafts[at, 0] = tokens

    def _run(self, states: Tensor, following: Tensor, step: KVCacheView) -> Tensor:
        following = following.to(step.index.device)
        return self.model.ahead(states.unsqueeze(0), following.unsqueeze(0), step.positions, step)[0]


class PromptLookupDrafter:
    """What followed when a sequence's newest tokens stood there before (prompt look-up), and how far to trust it.

    It always has a guess in mind where there is one, and so learns from what is said also while nothing is checked.
    """

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens: list[int] = []
        self.trust = 0.5  # how probably a guess is right, by those of late
        self._after: dict[tuple[int, ...], int] = {}
        self._guess: list[int] = []
        self.add(tokens)

    def add(self, tokens: tuple[int, ...] | list[int]) -> None:
        for token, guess in zip(tokens, self._guess, strict=False):
            self.trust += LEARNING * ((token == guess) - self.trust)
            if token != guess:
                break
        for token in tokens:
            for gram in GRAMS:
                if len(self.tokens) >= gram:
                    self._after[tuple(self.tokens[-gram:])] = len(self.tokens)
            self.tokens.append(token)
        self._guess = self._look()

    def propose(self, least: float) -> list[int]:
        """What follows, as far as it should be right with a probability of `least`, between 0 and 1."""
        if self.trust < least:
            return []
        return self._guess[: int(math.log(least) / math.log(min(self.trust, 0.999)))]

    def _look(self) -> list[int]:
        for gram in GRAMS:
            at = self._after.get(tuple(self.tokens[-gram:]))
            if at is not None:
                found = self.tokens[at : at + MAX_DRAFTS]
                return (found * MAX_DRAFTS)[:MAX_DRAFTS]  # what was repeated once, may be again and again
        return []


def propose_lookup(batch: DecodeBatch, at: Integers) -> None:
    """Drafts for the rows `at` from their own past."""
    least = min_confidence(batch.n)
    for row in at.tolist():
        sample = batch.sequences[row]
        if sample.drafter is None:
            sample.drafter = PromptLookupDrafter(sample.request.prompt)
        known = len(sample.drafter.tokens) - len(sample.request.prompt)
        sample.drafter.add(batch.tokens[row, known : batch.num_tokens[row]].tolist())
        guess = sample.drafter.propose(least)
        batch.drafts[row, : len(guess)] = guess


def min_confidence(sequences: int) -> float:
    """How probably a draft must be right to save more time than it takes, in a pass of so many sequences."""
    return COST * sequences / (sequences + WEIGHTS_TAKE)


def trim_drafts(batch: DecodeBatch, blocks: BlockManager) -> NDArray[np.bool_]:
    """Drop drafts that lead further than the answer, the blocks or the random numbers at hand, or to too many lanes →
    those that are left, bool [n, DRAFTS]. Rows whose drafts want their next block get it early while there are plenty.
    """
    n = batch.n
    place, count, drafts = batch.position[:n], batch.num_tokens[:n], batch.drafts[:n]
    right = drafts >= 0
    room = np.minimum(batch.max_new_tokens[:n] - count, WINDOW - count % WINDOW) - 1
    room = np.minimum(room, max(0, LANES // n - 1))
    beyond = (place + np.minimum(right.sum(1), room) >= batch.num_blocks[:n] * BLOCK).nonzero()[0].tolist()
    beyond = beyond[: max(0, blocks.free - n)]
    if beyond:
        batch.add_blocks(beyond, [blocks.allocate() for _ in beyond])
    room = np.minimum(room, batch.num_blocks[:n] * BLOCK - 1 - place)
    right &= np.arange(drafts.shape[1]) < room[:, None]
    drafts[~right] = -1
    return right
