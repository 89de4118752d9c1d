"""Speculative decoding: draft tokens, all verified in one forward pass (Leviathan et al. 2023).

Every token is sampled from the model's own logits with its own random number, as without drafts; a draft token is
accepted where it equals the sampled one, which saves a pass. So the distribution is kept, and the same seed gives the
same text with drafts and without.
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.engine.batch import MAX_DRAFTS, WINDOW, DecodeBatch
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.fused_cpu import fused_mtp_step
from rorqual.engine.model_runner import DecodeTokens, PrefillChunk
from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache, PrefillSlice
from rorqual.engine.sampling import sample_rows
from rorqual.engine.sequence import Integers
from rorqual.model import Transformer

SpeculativeMethod = Literal["mtp", "ngram"]  # where drafts come from
MAX_MTP_SEQS = 16  # sequences up to which MTP drafts save time: beyond, matrix products are bound by arithmetic
MAX_TOKENS_WITH_DRAFTS = 384  # of a step with drafts, since logits take memory; larger batches get no drafts
NGRAM_SIZES = (4, 3)  # tokens to match in prompt lookup, the longest first
ACCEPTANCE_DECAY = 0.3  # weight of the newest draft token in the moving average of the acceptance rate
# Verifying a draft token costs DRAFT_COST of a sequence's share of a pass in large batches, and nearly nothing for one
# sequence, since reading the weights takes as long as computing some ten tokens (SmolLM2 on two cores; costs of 0.4 to
# 1 differ by 2 %).
DRAFT_COST, WEIGHT_READ_TOKENS = 0.8, 12


class MTPDrafter:
    """Drafts one token with the model's own multi-token prediction module (V3 §2.2, §5.4.3).

    Its KV cache is the last layer; its input at position i is the model's hidden state there and the token after it. It
    samples with the random number that will sample the token itself, so that where the two distributions agree, so do
    the tokens.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self.fused = fused_mtp_step(model, cache)

    def prefill(self, chunks: list[PrefillChunk], states: Tensor) -> None:
        """Chunks of prompts, with the model's hidden states [M, D] of all their tokens."""
        known = [len(p.following) for p in chunks]
        if not sum(known):
            return
        prompts = [PrefillSlice(p.start, n, p.blocks) for p, n in zip(chunks, known, strict=True) if n]
        view = KVCacheView(self.cache, torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.long), prompts)
        parts = states.split([len(p.tokens) for p in chunks])
        self._run(
            torch.cat([part[:n] for part, n in zip(parts, known, strict=True)]),
            torch.cat([p.following for p in chunks]), view,
        )  # fmt: skip

    def propose(self, batch: DecodeBatch, at: Integers, decode: DecodeTokens, states: Tensor, last: Integers) -> None:
        """Write a draft token for each of the rows `at` [m] into the batch.

        decode: the tokens that the step sampled for these rows, each at the position before its own; states [N, D]: the
        model's hidden states at these positions; last [m]: index of each row's newest token.
        """
        if self.fused is not None:
            lengths = (decode.positions + 1).to(torch.int32)
            logit_rows = from_numpy(last).to(torch.int32)
            logits = self.fused(decode.tokens, decode.block_tables, lengths, logit_rows, states)[0]
        else:
            out = self._run(states, decode.tokens, KVCacheView(self.cache, decode.block_tables, decode.positions, []))
            logits = self.model.head(out[from_numpy(last).to(out.device)])
        tokens, _ = sample_rows(batch, at, logits)
        batch.drafts[at, 0] = tokens

    def _run(self, states: Tensor, following: Tensor, view: KVCacheView) -> Tensor:
        following = following.to(view.slot_mapping.device)
        return self.model.mtp_forward(states.unsqueeze(0), following.unsqueeze(0), view.positions, view)[0]


class PromptLookupDrafter:
    """Prompt lookup (ngram): drafts are the tokens that followed the sequence's newest n-gram when it last occurred.

    It always holds drafts where there is a match, so the acceptance rate is updated also while none are verified.
    """

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens: list[int] = []
        self.acceptance = 0.5  # moving average of the recent acceptance rate
        self._after: dict[tuple[int, ...], int] = {}
        self._drafts: list[int] = []
        self.add(tokens)

    def add(self, tokens: tuple[int, ...] | list[int]) -> None:
        """Append tokens to the sequence."""
        for token, draft in zip(tokens, self._drafts, strict=False):
            self.acceptance += ACCEPTANCE_DECAY * ((token == draft) - self.acceptance)
            if token != draft:
                break
        for token in tokens:
            for size in NGRAM_SIZES:
                if len(self.tokens) >= size:
                    self._after[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)
        self._drafts = self._lookup()

    def propose(self, min_confidence: float) -> list[int]:
        """Draft tokens, as long as all of them are accepted with a probability of `min_confidence` (0 to 1)."""
        if self.acceptance < min_confidence:
            return []
        return self._drafts[: int(math.log(min_confidence) / math.log(min(self.acceptance, 0.999)))]

    def _lookup(self) -> list[int]:
        for size in NGRAM_SIZES:
            at = self._after.get(tuple(self.tokens[-size:]))
            if at is not None:
                found = self.tokens[at : at + MAX_DRAFTS]
                return (found * MAX_DRAFTS)[:MAX_DRAFTS]  # a short match is a loop, which may go on
        return []


def propose_lookup(batch: DecodeBatch, at: Integers) -> None:
    """Write prompt-lookup drafts for the rows `at` into the batch."""
    confidence = min_confidence(batch.n)
    for row in at.tolist():
        sequence = batch.sequences[row]
        if sequence.drafter is None:
            sequence.drafter = PromptLookupDrafter(sequence.request.prompt)
        known = len(sequence.drafter.tokens) - len(sequence.request.prompt)
        sequence.drafter.add(batch.tokens[row, known : batch.num_tokens[row]].tolist())
        drafts = sequence.drafter.propose(confidence)
        batch.drafts[row, : len(drafts)] = drafts


def min_confidence(sequences: int) -> float:
    """The probability of acceptance from which a draft token saves more time than it takes, in such a batch."""
    return DRAFT_COST * sequences / (sequences + WEIGHT_READ_TOKENS)


def trim_drafts(batch: DecodeBatch, blocks: BlockManager) -> NDArray[np.bool_]:
    """Drop drafts beyond the answer's limit, the allocated blocks, the random numbers drawn or the step's tokens →
    those that are kept, bool [n, MAX_DRAFTS]. While blocks are plenty, drafts that need their row's next block get it.
    """
    n = batch.n
    position, count, drafts = batch.position[:n], batch.num_tokens[:n], batch.drafts[:n]
    kept = drafts >= 0
    limit = np.minimum(batch.max_new_tokens[:n] - count, WINDOW - count % WINDOW) - 1
    limit = np.minimum(limit, max(0, MAX_TOKENS_WITH_DRAFTS // n - 1))
    beyond = (position + np.minimum(kept.sum(1), limit) >= batch.num_blocks[:n] * BLOCK).nonzero()[0].tolist()
    beyond = beyond[: max(0, blocks.free - n)]
    if beyond:
        batch.add_blocks(beyond, blocks.allocate_many(len(beyond)))
    limit = np.minimum(limit, batch.num_blocks[:n] * BLOCK - 1 - position)
    kept &= np.arange(drafts.shape[1]) < limit[:, None]
    drafts[~kept] = -1
    return kept
