"""Context parallelism: ranks share a sequence, and each has two pieces of its tokens.

A sequence is cut into 2·size pieces; rank r has pieces r and 2·size − 1 − r, so that causal attention costs every rank
the same. Attention needs the keys and values of all tokens before: for latent attention ranks gather the latents
[C + R] and compute the keys and values of all heads from them, so V3 sends 576 numbers a token instead of the 40 960
of all heads (V2 §2.1.2). The backward pass sends the gradients of latents to the ranks whose they are. Everything else
of the network is done token by token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.errors import UserError
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.model import Transformer
from rorqual.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.model.moe import MixtureOfExperts
from rorqual.parallel.group import Group
from rorqual.shapes import Float

KEYS, FREQUENCIES = "keys and values", "expert frequencies"


def check_pieces(length: int, size: int) -> None:
    """Raises UserError for sequences that `size` ranks cannot share evenly."""
    if size > 1 and length % (2 * size):
        raise UserError(
            f"data.sequence_length = {length} with parallel.context = {size}: each rank has two equal pieces of a "
            f"sequence; make the length a multiple of {2 * size}"
        )


def positions(length: int, group: Group) -> Tensor:
    """Where in a sequence this rank's tokens are [length/size]."""
    pieces = torch.arange(length).chunk(2 * group.size)
    return torch.cat([pieces[group.place], pieces[-1 - group.place]])


@dataclass(frozen=True)
class Part(Batch):
    """A rank's tokens of a batch: T/size of T."""

    whole: Batch
    index: Tensor  # [T/size]

    @property
    def attention_mask(self) -> Tensor | None:
        """bool [B, 1, T/size, T], true where a token attends: causally, within its document."""
        documents = self.whole.documents
        if documents is None:
            return None
        causal = self.index[:, None] >= torch.arange(documents.shape[1], device=documents.device)
        return ((documents[:, self.index, None] == documents[:, None, :]) & causal)[:, None]

    def following(self, depth: int) -> Tensor:
        return self.whole.following(depth)[:, self.index]

    def ahead(self, depth: int) -> tuple[Tensor, Tensor]:
        targets, weights = self.whole.ahead(depth)
        return targets[:, self.index], weights[:, self.index]


def part(batch: Batch, group: Group) -> Batch:
    """This rank's tokens of the batch; the batch itself where a rank has all."""
    if group.size == 1:
        return batch
    index = positions(batch.inputs.shape[1], group)
    inputs, targets, weights, places = (
        t[:, index] for t in (batch.inputs, batch.targets, batch.weights, batch.positions)
    )
    documents = None if batch.documents is None else batch.documents[:, index]
    return Part(inputs, targets, weights, places, documents, batch, index)


def share_sequences(model: Transformer, group: Group) -> None:
    """Let attention see the tokens of all ranks, and the balance loss count them, in place."""
    if group.size == 1:
        return
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention | GroupedQueryAttention):
            vars(module)["expanded"] = functools.partial(_attention, module.expanded, group)
        elif isinstance(module, MixtureOfExperts):
            vars(module)["frequency"] = functools.partial(_frequency, module.frequency, group)


def _attention(expanded: Callable[..., Tensor], group: Group, *inputs: Tensor | None) -> Float[Tensor, "B T H V"]:
    """Attention of this rank's queries: each of its two pieces to all tokens up to its last."""
    *queries, a, b, mask = inputs
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise TypeError("attention has two tensors of keys and values")
    keys = _Gathered.apply(torch.cat([a.flatten(2), b.flatten(2)], dim=-1), group)
    size, length = a.shape[1] // 2, keys.shape[1]
    out: list[Tensor] = []
    for piece, number in enumerate((group.place, 2 * group.size - 1 - group.place)):
        own, seen = slice(piece * size, (piece + 1) * size), (number + 1) * length // (2 * group.size)
        a_, b_ = keys[:, :seen].split([a[0, 0].numel(), b[0, 0].numel()], dim=-1)
        here = None if mask is None else mask[:, :, own, :seen]
        some = [q[:, own] for q in queries if q is not None]
        out.append(expanded(*some, a_.unflatten(2, a.shape[2:]), b_.unflatten(2, b.shape[2:]), here))
    return torch.cat(out, dim=1)


def _frequency(frequency: Callable[..., Tensor], group: Group, *inputs: object) -> Float[Tensor, "B E"]:
    """How often experts are chosen in a sequence: over the tokens of all ranks."""
    return group.sum(frequency(*inputs), FREQUENCIES) / group.size


class _GatheredContext(Context):
    group: Group


class _Gathered(Function):
    """Rows [B, T/size, W] of every rank → [B, T, W] in order of the sequence; gradients come back to the rows' ranks.

    They are added in the order of ranks.
    """

    @staticmethod
    def forward(ctx: _GatheredContext, own: Tensor, group: Group) -> Tensor:
        ctx.group = group
        pieces = [piece.chunk(2, dim=1) for piece in group.gather(own, KEYS)]
        return torch.cat([first for first, _ in pieces] + [last for _, last in reversed(pieces)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatheredContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, size = ctx.group, ctx.group.size
        pieces = grad.chunk(2 * size, dim=1)
        parts = torch.stack([torch.cat([pieces[p], pieces[-1 - p]], dim=1) for p in range(size)])
        first, *others = group.exchange_counts(parts, f"gradients of {KEYS}").float()
        for other in others:
            first += other
        return first.to(grad.dtype), None
