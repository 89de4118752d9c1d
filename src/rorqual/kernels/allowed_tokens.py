"""The sets of tokens that top-k, top-p and min-p allow: found from logits, kept compactly, applied to other logits.

A set is kept as the ids of its tokens, or as one bit for every token of the vocabulary where that is shorter. Ids, not
a bound on logits, since other weights would allow other tokens. N tokens sampled, vocabulary V.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.kernels.sample import SamplingFilter, scaled_logprobs
from rorqual.shapes import Bool, Float, Int

FIRST_LOOK = 256  # most probable tokens that usually hold all allowed ones: sorting a vocabulary takes far longer
DROPPED = 100.0  # nats by which a dropped token is below the most probable one: e^−100 is 0 beside 1, but finite as log

Words = NDArray[np.int32]


@torch.no_grad()
def allowed_tokens(logits: Float[Tensor, "n V"], filter: SamplingFilter) -> Bool[Tensor, "n V"]:
    """The tokens that the filter keeps of each row, as kernels/sample.py describes it."""
    logp = scaled_logprobs(logits.float(), filter.temperature)
    if filter.top_p == 1 and filter.top_k == 0:
        return logp >= logp.amax(-1, keepdim=True) + np.log(filter.min_p) if filter.min_p else torch.ones_like(logp) > 0
    allowed = torch.zeros_like(logp, dtype=torch.bool)
    rows, look = torch.arange(len(logp), device=logp.device), FIRST_LOOK
    while len(rows):
        look = min(look, logp.shape[1])
        best = logp[rows].topk(look)
        probs = best.values.exp()
        keep = probs >= filter.min_p * probs[:, :1]
        if filter.top_p < 1:
            keep &= probs.cumsum(-1) - probs < filter.top_p
        if filter.top_k:
            keep[:, filter.top_k :] = False
        allowed[rows] = allowed[rows].scatter(1, best.indices, keep)
        if look == logp.shape[1]:
            break
        rows, look = rows[keep[:, -1]], 8 * look
    return allowed


def pack(allowed: Bool[Tensor, "n V"]) -> list[Words]:
    """Of each row, the ids of its tokens in ascending order, or where they are at least V/32 its bits in words."""
    bits: NDArray[np.bool_] = allowed.numpy(force=True)
    most = words_of(bits.shape[1])
    rows: list[Words] = []
    for row in bits:
        ids = row.nonzero()[0].astype(np.int32)
        rows.append(ids if len(ids) < most else _as_words(row, most))
    return rows


def words_of(vocab: int) -> int:
    """The length of a row of bits; shorter rows are ids."""
    return -(-vocab // 32)


def _as_words(row: NDArray[np.bool_], count: int) -> Words:
    padded = np.zeros(32 * count, dtype=np.bool_)
    padded[: len(row)] = row
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)


@dataclass(frozen=True)
class AllowedTokens:
    """The sets of N sampled tokens: what `pack` gives, one row after the other."""

    words: Int[Tensor, " W"]  # int32, as the next
    lengths: Int[Tensor, " N"]
    vocab: int

    @classmethod
    def of(cls, rows: Sequence[Words], vocab: int) -> "AllowedTokens":
        words = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return cls(torch.as_tensor(words), torch.tensor([len(row) for row in rows], dtype=torch.int32), vocab)

    @classmethod
    def joined(cls, parts: Sequence["AllowedTokens"]) -> "AllowedTokens":
        """Of the tokens of all parts, in order."""
        return cls(torch.cat([p.words for p in parts]), torch.cat([p.lengths for p in parts]), parts[0].vocab)

    def split(self, sizes: Sequence[int]) -> list["AllowedTokens"]:
        """Parts of so many tokens each."""
        lengths = self.lengths.split_with_sizes(list(sizes))
        words = self.words.split_with_sizes([int(part.sum()) for part in lengths])
        return [AllowedTokens(w, n, self.vocab) for w, n in zip(words, lengths, strict=True)]

    def mask(self, at: Int[Tensor, " n"]) -> Bool[Tensor, "n V"]:
        """Which tokens are allowed, of the sampled tokens `at`; on the CPU."""
        at, words = at.cpu(), self.words.numpy()
        ends, lengths = self.lengths.cumsum(0)[at].numpy(), self.lengths[at].numpy()
        bits = np.zeros((len(at), self.vocab), dtype=np.bool_)
        for row, end, length in zip(bits, ends, lengths, strict=True):
            own = words[end - length : end]
            if len(own) < words_of(self.vocab):
                row[own] = True
            else:
                row[:] = np.unpackbits(own.astype("<i4").view(np.uint8), bitorder="little")[: self.vocab]
        return torch.as_tensor(bits)


def drop_others_(
    logits: Float[Tensor, "n V"], allowed: Bool[Tensor, "n V"], temperature: float
) -> Float[Tensor, "n V"]:
    """Lower, in place, the logits of tokens that are not allowed until their probability is 0, but their log finite."""
    best = logits.masked_fill(~allowed, float("-inf")).amax(-1, keepdim=True)
    return logits.copy_(torch.where(allowed, logits, best - DROPPED * temperature))
