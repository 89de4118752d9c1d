"""One pass of the network over what a step computes: new tokens of running sequences, and pieces of prompts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.cuda_graphs import CUDAGraphRunner, can_capture
from rorqual.engine.fused_cpu import fused_decode_step
from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache, PrefillSlice
from rorqual.kernels.linear import any_shape, linear
from rorqual.model import Transformer

# Lanes a call: more read weights no more seldom, but what a layer leaves for the next outgrows the cache (3 % with
# prompts of 512).
TOGETHER = 192
ROWS = 24  # in whose multiples the compiled products take lanes (cpu/lowbit.h)


@dataclass
class DecodeTokens:
    """N new tokens, each in its place of the sequence whose blocks its table lists; those of one sequence, if there
    are several, side by side, in order, and its newest.
    """

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    block_tables: Tensor  # int32 [N, ·]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def padded(self, size: int) -> "DecodeTokens":
        """With idle lanes, which read and write the spare block, up to `size`."""
        more = size - len(self)
        if more == 0:
            return self
        tokens, places = (torch.cat([x, x.new_zeros(more)]) for x in (self.tokens, self.positions))
        return DecodeTokens(
            tokens,
            places,
            torch.cat([self.block_tables, self.block_tables.new_zeros(more, self.block_tables.shape[1])]),
        )


@dataclass
class PrefillChunk:
    """Tokens of a prompt, the first in place `start`, with the blocks that they and all before them lie in.

    following: the token after each, which the prompt's last one lacks.
    """

    tokens: Tensor
    following: Tensor
    start: int
    blocks: list[int]

    @property
    def ends(self) -> bool:
        """Whether it is the prompt's last."""
        return len(self.following) < len(self.tokens)


class ModelRunner:
    """What a lane says does not depend on its company: packed networks compute every row for itself (cpu/step.cpp)."""

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self.direct = fused_decode_step(model, cache)
        self.graphs = CUDAGraphRunner(model, cache) if can_capture(model) else None

    def __call__(self, lanes: DecodeTokens, pieces: list[PrefillChunk]) -> tuple[Tensor, Tensor, Tensor]:
        """→ logits [N + E, V] of the lanes and of the E prompts that end in these pieces; hidden states [N, D] of the
        lanes and [M, D] of the pieces end to end.
        """
        n = len(lanes)
        if self.graphs is not None and n and not pieces:
            logits, states = self.graphs(*self._step(lanes.padded(self.graphs.size(n)), []))
            return logits[:n], states[:n], states[:0]
        if self.direct is None:
            head = self.model.head_weight
            states = self._states(lanes.padded(self._size(n)), pieces)
            states, read = states[:n], states[len(states) - sum(len(p.tokens) for p in pieces) :]
            wanted = torch.cat([states, read[_ends(pieces)]]) if pieces else states
            return linear(wanted, head) if len(wanted) else wanted, states, read
        if not pieces:
            logits, states = self._directly(lanes)
            return logits, states, states[n:]
        ends = _ends(pieces)
        # Latent attention reads a prompt in its expanded form, which is less work for many tokens of a sequence.
        if self.model.config.is_mla:
            logits, states = self._directly(lanes)
            read = self._states(_none(lanes), pieces)
            if len(ends):
                more = linear(read[ends], self.model.head_weight).float()
                logits = torch.cat([logits, more]) if n else more
            return logits, states, read
        wanted = torch.cat([torch.arange(n), n + ends]).to(torch.int32)
        logits, states = self._directly(_joined(lanes, pieces), wanted)
        return logits, states[:n], states[n:]

    def _directly(self, lanes: DecodeTokens, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the lanes whose numbers are `wanted`, in order, or of all; states of all."""
        assert self.direct is not None
        if not len(lanes):
            return torch.empty(0), torch.empty(0)
        lengths = torch.from_numpy((lanes.positions.numpy() + 1).astype(np.int32))  # a third of PyTorch's time for it
        if len(lanes) <= TOGETHER:
            return self.direct(lanes.tokens, lanes.block_tables, lengths, wanted)
        # As even as can be: a call for the few that are left over would read all the weights for them.
        calls = -(-len(lanes) // TOGETHER)
        size = -(-len(lanes) // (calls * ROWS)) * ROWS
        parts = []
        for first in range(0, len(lanes), size):
            some = slice(first, first + size)
            here = None if wanted is None else wanted[(wanted >= first) & (wanted < first + size)] - first
            parts.append(self.direct(lanes.tokens[some], lanes.block_tables[some], lengths[some], here))
        logits, states = (torch.cat(x) for x in zip(*parts, strict=True))
        return logits, states

    def _states(self, lanes: DecodeTokens, pieces: list[PrefillChunk]) -> Tensor:
        if not len(lanes) and not pieces:
            return torch.empty(0)
        tokens, step = self._step(lanes, pieces)
        return self.model(tokens, step.positions, cache=step)[0]

    def _step(self, lanes: DecodeTokens, pieces: list[PrefillChunk]) -> tuple[Tensor, KVCacheView]:
        """Their tokens [1, N], and where these go."""
        step = KVCacheView(
            self.cache,
            lanes.block_tables,
            lanes.positions,
            [PrefillSlice(p.start, len(p.tokens), p.blocks) for p in pieces],
        )
        return torch.cat([lanes.tokens, *(p.tokens for p in pieces)]).unsqueeze(0).to(step.index.device), step

    def _size(self, n: int) -> int:
        """Lanes to compute: those there are and, where a new shape costs something, idle ones up to one of eight sizes
        an octave: a batch that shrinks by one sequence at a time has as many shapes as sequences.
        """
        # Latent attention has products of its own, between linears and cache.
        if n == 0 or (not self.model.config.is_mla and any_shape(self.model.head_weight, n)):
            return n
        step = 1 << max(0, n.bit_length() - 4)
        return -(-n // step) * step


def _ends(pieces: list[PrefillChunk]) -> Tensor:
    """Of all tokens of the pieces the numbers of those that end a prompt."""
    lengths = torch.tensor([len(p.tokens) for p in pieces])
    return (lengths.cumsum(0) - 1)[torch.tensor([p.ends for p in pieces], dtype=torch.bool)]


def _none(lanes: DecodeTokens) -> DecodeTokens:
    return DecodeTokens(lanes.tokens[:0], lanes.positions[:0], lanes.block_tables[:0])


def _joined(lanes: DecodeTokens, pieces: list[PrefillChunk]) -> DecodeTokens:
    """A prompt's tokens are lanes of one sequence too."""
    if not pieces:
        return lanes
    width = max(lanes.block_tables.shape[1], *(len(p.blocks) for p in pieces))
    tables = [F.pad(lanes.block_tables, (0, width - lanes.block_tables.shape[1]))]
    for p in pieces:
        table = torch.tensor(p.blocks, dtype=torch.int32)
        tables.append(F.pad(table, (0, width - len(table))).expand(len(p.tokens), width))
    places = [torch.arange(p.start, p.start + len(p.tokens)) for p in pieces]
    tokens = torch.cat([lanes.tokens, *(p.tokens for p in pieces)])
    return DecodeTokens(tokens, torch.cat([lanes.positions, *places]), torch.cat(tables))
