"""Rollouts laid out for training: a prompt stands once in a row, its completions after it, none seeing another.

    row:       p p p a a a b b q q c c c c        p, q prompts; a, b completions of p, c of q
    positions: 0 1 2 3 4 5 3 4 0 1 2 3 4 5

Every completion attends to its prompt and itself, so its log-probabilities are those of the sequence alone, while
the prompt is computed once for its group and rows fill up evenly. A token is predicted by the one before it, which
for a completion's first token is the prompt's last: hence indices into the hidden states instead of a shift. A
completion's last token is only a target.
B rows, T tokens a row, N target tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Tried beside those of the longest sequence and the longest group.
ROW_LENGTHS = (*range(64, 513, 32), 768, 1024, 2048, 4096)


@dataclass(frozen=True)
class TrainingRows:
    """One micro-batch."""

    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    mask: Tensor | None  # bool [B, 1, T, T]; None: causal, one sequence a row
    source: Tensor  # [N] index into the B·T hidden states: which one predicts
    targets: Tensor  # [N]
    sequence: Tensor  # [N] number of the completion
    place: Tensor  # [N] where the token stands when all completions are laid end to end

    def to(self, device: torch.device) -> "TrainingRows":
        moved = (None if t is None else t.to(device) for t in vars(self).values())
        return TrainingRows(*moved)


@dataclass
class _Row:
    """Segments (prompt number, its completions here) and the tokens they take."""

    segments: list[tuple[int, list[int]]]
    length: int


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    micro_tokens: int,
    cost: Callable[[int], float],
) -> list[TrainingRows]:
    """Micro-batches of at most `micro_tokens` (or one row) that hold every completion once.

    prompt_of[i] is the prompt of completion i. Longer rows share more prompts but pay for attention over the whole
    row: `cost(T)`, the cost of a token in a row of T, decides their length.
    """
    prompt_sizes = [len(p) for p in prompts]
    sizes = [len(c) - 1 for c in completions]
    longest = max(prompt_sizes[p] + n for p, n in zip(prompt_of, sizes, strict=True))
    groups = list(prompt_sizes)
    for p, n in zip(prompt_of, sizes, strict=True):
        groups[p] += n
    lengths = [longest, *(n for n in (max(groups), *ROW_LENGTHS) if longest < n <= micro_tokens)]
    layouts = [_fill(prompt_sizes, sizes, prompt_of, n) for n in lengths]
    best = min(
        layouts, key=lambda rows: sum(len(b) * b[0].length * cost(b[0].length) for b in _split(rows, micro_tokens))
    )
    return [_build(rows, prompts, completions) for rows in _split(best, micro_tokens)]


def _fill(prompt_sizes: list[int], sizes: list[int], prompt_of: Sequence[int], limit: int) -> list[_Row]:
    """First fit, longest completion of a prompt first; a prompt is repeated in each row that its group reaches."""
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        groups.setdefault(p, []).append(i)
    rows: list[_Row] = []
    for p, members in groups.items():
        here: list[tuple[_Row, list[int]]] = []  # rows that hold this prompt
        for i in sorted(members, key=lambda i: -sizes[i]):
            place = next((h for h in here if h[0].length + sizes[i] <= limit), None)
            if place is None:
                need = prompt_sizes[p] + sizes[i]
                row = next((r for r in rows[-64:] if r.length + need <= limit), None)
                if row is None:
                    rows.append(row := _Row([], 0))
                place = row, []
                row.segments.append((p, place[1]))
                row.length += prompt_sizes[p]
                here.append(place)
            place[1].append(i)
            place[0].length += sizes[i]
    return rows


def _split(rows: list[_Row], micro_tokens: int) -> Iterator[list[_Row]]:
    """Rows of like length together, longest first, up to `micro_tokens` with padding."""
    rows = sorted(rows, key=lambda r: -r.length)
    while rows:
        count = max(1, micro_tokens // rows[0].length)
        yield rows[:count]
        rows = rows[count:]


def _build(rows: list[_Row], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TrainingRows:
    B, T = len(rows), rows[0].length
    tokens, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    # Segment 0 is padding; branch 0 of a segment is its prompt, which all its branches may look at.
    segments, branches = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    source: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sequence: list[np.ndarray] = []
    place: list[np.ndarray] = []
    starts = np.cumsum([0] + [len(c) for c in completions])
    for b, row in enumerate(rows):
        at = 0
        for s, (p, members) in enumerate(row.segments, 1):
            prompt = len(prompts[p])
            end = at + prompt
            tokens[b, at:end], positions[b, at:end], segments[b, at:end] = prompts[p], np.arange(prompt), s
            last = b * T + end - 1
            for k, i in enumerate(members, 1):
                completion = np.asarray(completions[i])
                n = len(completion) - 1
                new = slice(end, end + n)
                tokens[b, new], positions[b, new] = completion[:-1], np.arange(prompt, prompt + n)
                segments[b, new], branches[b, new] = s, k
                source += [np.array([last]), np.arange(b * T + end, b * T + end + n)]
                targets.append(completion)
                sequence.append(np.full(n + 1, i))
                place.append(np.arange(starts[i], starts[i + 1]))
                end += n
            at = end
    alone = all(len(row.segments) == 1 and len(row.segments[0][1]) == 1 for row in rows)
    return TrainingRows(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        mask=None if alone else isolation_mask(torch.from_numpy(segments), torch.from_numpy(branches)),
        source=torch.from_numpy(np.concatenate(source)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        sequence=torch.from_numpy(np.concatenate(sequence)),
        place=torch.from_numpy(np.concatenate(place)),
    )


def isolation_mask(segments: Tensor, branches: Tensor) -> Tensor:
    """segments, branches [B, T] → bool [B, 1, T, T]: earlier tokens of the same branch, or of the segment's prompt."""
    same = segments[:, :, None] == segments[:, None, :]
    branch = branches[:, None, :]
    same &= (branch == branches[:, :, None]) | (branch == 0)
    return same.tril_().unsqueeze(1)
