"""Rollouts packed for training: a block holds a prompt once and its completions after it, masked from each other.

    block:     p p p a a a b b        p the prompt, a and b completions of it
    positions: 0 1 2 3 4 5 3 4

A completion attends to its prompt and to itself, so its log-probabilities are those of prompt + completion alone,
while the prompt is computed once per block. A completion's first token is predicted by the prompt's last token, hence
indices into the hidden states (`source`) instead of a shift. A completion's last token is only a target. Of an episode
of several turns the completion is all that follows the first prompt, and what was not sampled is no target.
Blocks of all lengths are concatenated into one row, so that almost no padding is computed.
Shapes: T tokens of a micro-batch, N target tokens, n blocks of t tokens each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.kernels.allowed_tokens import AllowedTokens
from rorqual.model.router_hooks import NOT_RECORDED
from rorqual.shapes import Bool, Int

LENGTH_MULTIPLE = 16  # blocks are padded to a multiple of this, so that matmul shapes repeat
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
PADDING = -1  # branch id of padding tokens


@dataclass(frozen=True)
class PackedRollout:
    """One micro-batch."""

    tokens: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    mask: tuple[Bool[Tensor, "_ 1 _ _"], ...]  # [n, 1, t, t] per block length, in block order
    source: Int[Tensor, " N"]  # index into the T hidden states of the one that predicts the target
    targets: Int[Tensor, " N"]  # token ids
    sequence: Int[Tensor, " N"]  # index of the completion
    offset: Int[Tensor, " N"]  # index of the token in the concatenation of all completions' sampled tokens
    origin: Int[Tensor, " T"]  # index of each of the T tokens in that of all prompts, then all completions; -1: padding
    recorded: Int[Tensor, "T L K"] | None = None  # the experts that the rollout's routers chose
    allowed: AllowedTokens | None = None  # by `offset`: what tokens were sampled from, where filters left some out

    def to(self, device: torch.device) -> "PackedRollout":
        moved = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return PackedRollout(**moved, mask=tuple(t.to(device) for t in self.mask), allowed=self.allowed)

    def allowed_rows(self, at: Int[Tensor, " n"]) -> Bool[Tensor, "n V"]:
        """The tokens that some of the N targets were sampled from."""
        assert self.allowed is not None
        return self.allowed.mask(self.offset[at]).to(self.offset.device)


@dataclass
class _Block:
    prompt: int
    members: list[int]  # indices of the completions in this block
    length: int


def pack_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int | None],
    micro_tokens: int,
    cost: Callable[[int], float],
    sampled: Sequence[Sequence[bool]] | None = None,
) -> list[PackedRollout]:
    """Micro-batches of at most `micro_tokens` tokens (or one block) that hold every completion once, each whole.

    prompts, completions: token ids; prompt_of[i] is the index of completion i's prompt, None: leave it out. sampled:
    which tokens of each completion are targets, its last one always; by default all. Longer blocks share a prompt among
    more completions but compute attention over the whole block: the blocks with the lowest total cost are taken, where
    `cost(t)` is the cost of one token in a block of t tokens.
    """
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        if p is not None:
            groups.setdefault(p, []).append(i)
    sizes = [len(c) - 1 for c in completions]
    blocks: list[_Block] = []
    for p, members in groups.items():
        blocks += _cheapest(p, len(prompts[p]), members, sizes, micro_tokens, cost)
    masks = [np.asarray(mask, bool) for mask in sampled or [[True] * len(c) for c in completions]]
    return [_build(batch, prompts, completions, masks) for batch in _split(blocks, micro_tokens)]


def _cheapest(
    prompt: int, prompt_size: int, members: list[int], sizes: list[int], limit: int, cost: Callable[[int], float]
) -> list[_Block]:
    """Split one group into balanced blocks, within `limit` where possible: add blocks while that lowers the cost."""
    best: list[_Block] = []
    lowest = float("inf")
    for count in range(1, len(members) + 1):
        blocks = [_Block(prompt, [], prompt_size) for _ in range(count)]
        for i in sorted(members, key=lambda i: -sizes[i]):
            shortest = min(blocks, key=lambda b: (b.length, len(b.members)))
            shortest.members.append(i)
            shortest.length += sizes[i]
        for block in blocks:
            block.length = -(-block.length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if any(b.length > limit and len(b.members) > 1 for b in blocks):
            continue
        total = sum(b.length * cost(b.length) for b in blocks)
        if total >= lowest:
            break
        best, lowest = blocks, total
    return best


def _split(blocks: list[_Block], micro_tokens: int) -> Iterator[list[_Block]]:
    """Micro-batches of up to `micro_tokens` tokens, longest blocks first."""
    batch: list[_Block] = []
    length = 0
    for block in sorted(blocks, key=lambda b: -b.length):
        if batch and length + block.length > micro_tokens:
            yield batch
            batch, length = [], 0
        batch.append(block)
        length += block.length
    yield batch


def _build(
    blocks: list[_Block], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], sampled: list[Bools]
) -> PackedRollout:
    T = sum(b.length for b in blocks)
    tokens, positions = np.zeros(T, np.int64), np.zeros(T, np.int64)
    branches = np.full(T, PADDING, np.int32)  # 0 is the prompt
    source: list[Ints] = []
    targets: list[Ints] = []
    sequence: list[Ints] = []
    offset: list[Ints] = []
    origin: Ints = np.full(T, PADDING, np.int64)
    starts: Ints = np.cumsum([0] + [len(c) for c in completions])
    target_starts: Ints = np.cumsum([0] + [mask.sum() for mask in sampled])
    prompt_starts: Ints = np.cumsum([0] + [len(p) for p in prompts])
    start = 0
    for block in blocks:
        prompt = prompts[block.prompt]
        end = start + len(prompt)
        tokens[start:end], positions[start:end], branches[start:end] = prompt, np.arange(len(prompt)), 0
        origin[start:end] = np.arange(prompt_starts[block.prompt], prompt_starts[block.prompt + 1])
        last = end - 1
        for k, i in enumerate(block.members, 1):
            completion: Ints = np.asarray(completions[i])
            n = len(completion) - 1
            new = slice(end, end + n)
            tokens[new], positions[new], branches[new] = completion[:-1], len(prompt) + np.arange(n), k
            origin[new] = prompt_starts[-1] + starts[i] + np.arange(n)
            before: Ints = np.concatenate([[last], np.arange(end, end + n)])
            at: Ints = np.flatnonzero(sampled[i])
            source.append(before[at])
            chosen: Ints = completion[at]
            targets.append(chosen)
            sequence.append(np.full(len(at), i))
            offset.append(target_starts[i] + np.arange(len(at)))
            end += n
        start += block.length
    masks: list[Tensor] = []
    start = 0
    for length, alike in groupby(blocks, key=lambda b: b.length):
        end = start + length * len(list(alike))
        masks.append(branch_mask(torch.as_tensor(branches[start:end]).view(-1, length)))
        start = end
    return PackedRollout(
        tokens=torch.as_tensor(tokens).unsqueeze(0),
        positions=torch.as_tensor(positions).unsqueeze(0),
        mask=tuple(masks),
        source=torch.as_tensor(np.concatenate(source)),
        targets=torch.as_tensor(np.concatenate(targets).astype(np.int64)),
        sequence=torch.as_tensor(np.concatenate(sequence)),
        offset=torch.as_tensor(np.concatenate(offset)),
        origin=torch.as_tensor(origin),
    )


def routing_table(
    prompts: Sequence[Sequence[int]], routing: Sequence[Int[Tensor, "_ L K"]], prompt_of: Sequence[int]
) -> Int[Tensor, "_ L K"]:
    """The recorded experts of every token by its `origin`, from those of prompt and completion of each completion.

    NOT_RECORDED stands for a completion's last token, for prompts without a completion and, in the last row, for
    padding.
    """
    shape = routing[0].shape[1:]
    heads = {p: own[: len(prompts[p])] for own, p in zip(routing, prompt_of, strict=True)}
    none = routing[0].new_full((1, *shape), NOT_RECORDED)
    rows = [heads[p] if p in heads else none.expand(len(prompt), *shape) for p, prompt in enumerate(prompts)]
    for own, p in zip(routing, prompt_of, strict=True):
        rows += [own[len(prompts[p]) :], none]
    return torch.cat([*rows, none])


def branch_mask(branches: Int[Tensor, "n t"]) -> Bool[Tensor, "n 1 t t"]:
    """A token attends to itself and earlier tokens of its branch and of branch 0.

    Padding attends to padding only.
    """
    query, key = branches[:, :, None], branches[:, None, :]
    allowed = (query == key) | ((key == 0) & (query != PADDING))
    return allowed.tril_().unsqueeze(1)
