"""Rollouts laid out for training: a prompt stands once in a block, its completions after it, none seeing another.

    block:     p p p a a a b b        p the prompt, a and b completions of it
    positions: 0 1 2 3 4 5 3 4

Every completion attends to its prompt and itself, so its log-probabilities are those of the sequence alone, while
the prompt is computed once for all. A token is predicted by the one before it, which for a completion's first token
is the prompt's last: hence indices into the hidden states instead of a shift. A completion's last token is only a
target. Blocks of all lengths lie end to end in one row, so that next to nothing is computed for filling up.
T tokens of a micro-batch, N target tokens, n blocks of t tokens each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

STEP = 16  # a block's length is filled up to a multiple, so that the shapes of products repeat
FILL = -1


@dataclass(frozen=True)
class PackedRollout:
    """One micro-batch."""

    tokens: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    mask: tuple[Tensor, ...]  # bool [n, 1, t, t] of the blocks of each length, in their order
    source: Tensor  # [N] index into the T hidden states: which one predicts
    targets: Tensor  # [N]
    sequence: Tensor  # [N] number of the completion
    place: Tensor  # [N] where the token stands when all completions are laid end to end

    def to(self, device: torch.device) -> "PackedRollout":
        moved = {name: t.to(device) for name, t in vars(self).items() if name != "mask"}
        return PackedRollout(**moved, mask=tuple(t.to(device) for t in self.mask))


@dataclass
class _Block:
    prompt: int
    members: list[int]  # its completions here
    length: int


def pack_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    micro_tokens: int,
    cost: Callable[[int], float],
) -> list[PackedRollout]:
    """Micro-batches of at most `micro_tokens` (or one block) that hold every completion once.

    prompt_of[i] is the prompt of completion i. Longer blocks share a prompt among more completions but pay for
    attention over the whole block: `cost(t)`, the cost of a token in a block of t, decides.
    """
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        groups.setdefault(p, []).append(i)
    sizes = [len(c) - 1 for c in completions]
    blocks: list[_Block] = []
    for p, members in groups.items():
        blocks += _cheapest(p, len(prompts[p]), members, sizes, micro_tokens, cost)
    return [_build(some, prompts, completions) for some in _split(blocks, micro_tokens)]


def _cheapest(
    prompt: int, prompt_size: int, members: list[int], sizes: list[int], limit: int, cost: Callable[[int], float]
) -> list[_Block]:
    """A group in even blocks within `limit` where that can be: as many as lower the cost, one by one."""
    best: list[_Block] = []
    lowest = float("inf")
    for count in range(1, len(members) + 1):
        blocks = [_Block(prompt, [], prompt_size) for _ in range(count)]
        for i in sorted(members, key=lambda i: -sizes[i]):
            shortest = min(blocks, key=lambda b: (b.length, len(b.members)))
            shortest.members.append(i)
            shortest.length += sizes[i]
        for block in blocks:
            block.length = -(-block.length // STEP) * STEP
        if any(b.length > limit and len(b.members) > 1 for b in blocks):
            continue
        total = sum(b.length * cost(b.length) for b in blocks)
        if total >= lowest:
            break
        best, lowest = blocks, total
    return best


def _split(blocks: list[_Block], micro_tokens: int) -> Iterator[list[_Block]]:
    """Longest first, up to `micro_tokens`."""
    some: list[_Block] = []
    length = 0
    for block in sorted(blocks, key=lambda b: -b.length):
        if some and length + block.length > micro_tokens:
            yield some
            some, length = [], 0
        some.append(block)
        length += block.length
    yield some


def _build(
    blocks: list[_Block], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> PackedRollout:
    T = sum(b.length for b in blocks)
    tokens, positions = np.zeros(T, np.int64), np.zeros(T, np.int64)
    branches = np.full(T, FILL, np.int32)  # 0 is the prompt
    source: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sequence: list[np.ndarray] = []
    place: list[np.ndarray] = []
    starts = np.cumsum([0] + [len(c) for c in completions])
    start = 0
    for block in blocks:
        prompt = prompts[block.prompt]
        end = start + len(prompt)
        tokens[start:end], positions[start:end], branches[start:end] = prompt, np.arange(len(prompt)), 0
        last = end - 1
        for k, i in enumerate(block.members, 1):
            completion = np.asarray(completions[i])
            n = len(completion) - 1
            new = slice(end, end + n)
            tokens[new], positions[new], branches[new] = completion[:-1], len(prompt) + np.arange(n), k
            source += [np.array([last]), np.arange(end, end + n)]
            targets.append(completion)
            sequence.append(np.full(n + 1, i))
            place.append(np.arange(starts[i], starts[i + 1]))
            end += n
        start += block.length
    masks, start = [], 0
    for length, alike in groupby(blocks, key=lambda b: b.length):
        end = start + length * len(list(alike))
        masks.append(branch_mask(torch.from_numpy(branches[start:end]).view(-1, length)))
        start = end
    return PackedRollout(
        tokens=torch.from_numpy(tokens).unsqueeze(0),
        positions=torch.from_numpy(positions).unsqueeze(0),
        mask=tuple(masks),
        source=torch.from_numpy(np.concatenate(source)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        sequence=torch.from_numpy(np.concatenate(sequence)),
        place=torch.from_numpy(np.concatenate(place)),
    )


def branch_mask(branches: Tensor) -> Tensor:
    """branches [n, t] → bool [n, 1, t, t]: earlier tokens of the same branch, or of branch 0 (but not for filling)."""
    mine, other = branches[:, :, None], branches[:, None, :]
    seen = (mine == other) | ((other == 0) & (mine != FILL))
    return seen.tril_().unsqueeze(1)
