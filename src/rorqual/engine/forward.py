"""One pass of the network over what a step computes: new tokens of running sequences, and pieces of prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.cache import BlockCache, Prompt, Step
from rorqual.engine.direct import direct_step
from rorqual.kernels.linear import any_shape, linear
from rorqual.model import Transformer


@dataclass
class Lanes:
    """N new tokens, each in its place of the sequence whose blocks its table lists; those of one sequence, if there
    are several, side by side and its newest.
    """

    tokens: Tensor  # int64 [N]
    places: Tensor  # int64 [N]
    tables: Tensor  # int32 [N, ·]
    apart: bool  # no two belong to one sequence

    def __len__(self) -> int:
        return len(self.tokens)

    def padded(self, size: int) -> "Lanes":
        """With idle lanes, which read and write the spare block, up to `size`."""
        more = size - len(self)
        if more == 0:
            return self
        tokens, places = (torch.cat([x, x.new_zeros(more)]) for x in (self.tokens, self.places))
        return Lanes(tokens, places, torch.cat([self.tables, self.tables.new_zeros(more, self.tables.shape[1])]), True)


@dataclass
class Piece:
    """Tokens of a prompt, the first in place `start`, with the blocks that they and all before them lie in.

    following: the token after each, which the prompt's last one lacks.
    """

    tokens: Tensor
    following: Tensor
    start: int
    blocks: list[int]


class Forward:
    """Lanes take the same way whatever else there is to compute: what they say must not depend on their company."""

    def __init__(self, model: Transformer, cache: BlockCache) -> None:
        self.model, self.cache = model, cache
        self.direct = direct_step(model, cache)

    def __call__(self, lanes: Lanes, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """→ logits [N, V] of the lanes, hidden states [N, D] of the lanes and [M, D] of the pieces end to end."""
        n, head = len(lanes), self.model.head_weight
        if self.direct is not None:
            logits, hidden = self._directly(lanes)
            return logits, hidden, self._states(_none(lanes), pieces)
        states = self._states(lanes.padded(self._size(n)), pieces)
        size = len(states) - sum(len(p.tokens) for p in pieces)
        return linear(states[:n], head) if n else states[:0], states[:n], states[size:]

    def _directly(self, lanes: Lanes) -> tuple[Tensor, Tensor]:
        assert self.direct is not None
        if not len(lanes):
            return torch.empty(0), torch.empty(0)
        lengths = (lanes.places + 1).to(torch.int32)
        logits, hidden = self.direct(lanes.tokens, lanes.tables, lengths, lanes.apart)
        return logits, hidden.to(self.model.head_weight.dtype)

    def _states(self, lanes: Lanes, pieces: list[Piece]) -> Tensor:
        if not len(lanes) and not pieces:
            return torch.empty(0)
        step = Step(self.cache, lanes.tables, lanes.places, [Prompt(p.start, len(p.tokens), p.blocks) for p in pieces])
        tokens = torch.cat([lanes.tokens, *(p.tokens for p in pieces)]).unsqueeze(0).to(step.index.device)
        return self.model(tokens, step.positions, cache=step)[0]

    def _size(self, n: int) -> int:
        """Lanes to compute: those there are and, where a new shape costs something, idle ones up to one of eight sizes
        an octave: a batch that shrinks by one sequence at a time has as many shapes as sequences.
        """
        # Latent attention has products of its own, between linears and cache.
        if n == 0 or (not self.model.config.is_mla and any_shape(self.model.head_weight, n)):
            return n
        step = 1 << max(0, n.bit_length() - 4)
        return -(-n // step) * step


def _none(lanes: Lanes) -> Lanes:
    return Lanes(lanes.tokens[:0], lanes.places[:0], lanes.tables[:0], True)
