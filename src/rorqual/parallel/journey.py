"""The way of tokens to the experts of other ranks, hop by hop, and back.

N tokens here, D hidden, K experts a token, M rows at the experts.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.kernels.block_scaled import decode, quantize
from rorqual.kernels.moe_permute import Permutation, sort_by_expert, sum_of_rows
from rorqual.kernels.number_formats import FP8_TRAVEL
from rorqual.parallel.courier import Courier, Trip
from rorqual.parallel.group import Group
from rorqual.shapes import Float, Int, Int64

DISPATCH, COMBINE, COUNTS = "dispatch", "combine", "dispatch counts"


@dataclass(frozen=True)
class Hop:
    """The way of N tokens to places of a group: a row for every (token, destination)."""

    group: Group
    permutation: Permutation  # rows in order of their destinations
    destinations: int  # at most, of a token
    send: list[int]  # rows to each place
    receive: list[int]  # rows from each place

    @classmethod
    def plan(cls, group: Group, to: Int[Tensor, "N destinations"]) -> "Hop":
        """`to`: places of the group, -1 for none."""
        permutation = sort_by_expert(to, group.size, partial=True)
        receive = group.exchange_counts(permutation.load, COUNTS)
        return cls(group, permutation, to.shape[1], permutation.load.tolist(), receive.tolist())

    def there(self, columns: list[Tensor], what: str = DISPATCH) -> list[Tensor]:
        """Tensors [N, …] by token → by row received."""
        token = self.permutation.slot // self.destinations
        return self._travel([c.index_select(0, token) for c in columns], self.send, self.receive, what)

    def back(self, columns: list[Tensor], what: str = COMBINE) -> list[Tensor]:
        """Tensors [M, width] by row received → the sums [N, width] over each token's rows."""
        returned = self._travel(columns, self.receive, self.send, what)
        return [sum_of_rows(c, self.permutation.row, self.destinations) for c in returned]

    def _travel(self, columns: list[Tensor], send: list[int], receive: list[int], what: str) -> list[Tensor]:
        if len(columns) == 1:
            return [self.group.all_to_all(columns[0], send, receive, what)]
        bytes_of = [c.contiguous().view(torch.uint8).flatten(1) for c in columns]
        widths = [b.shape[1] for b in bytes_of]
        rows = self.group.all_to_all(torch.cat(bytes_of, dim=1), send, receive, what)
        parts = rows.split(widths, dim=1)
        copies = [p.clone(memory_format=torch.contiguous_format) for p in parts]
        return [p.view(c.dtype).view(-1, *c.shape[1:]) for p, c in zip(copies, columns, strict=True)]


@dataclass
class Journey:
    """The way of one micro-batch's tokens to the experts of a layer, and how they are written on it."""

    courier: Courier
    fp8: bool
    dtype: torch.dtype
    copies: int = 1  # of a token that set out
    hops: list[Hop] = field(default_factory=list[Hop])
    chosen: Int64[Tensor, "M _"] = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.int64))  # of each row
    trip: Trip[list[Tensor]] | None = None  # the newest

    def encode(self, x: Float[Tensor, "N D"]) -> list[Tensor]:
        x = x.repeat_interleave(self.copies, dim=0) if self.copies > 1 else x.contiguous()
        if not self.fp8:
            return [x]
        codes, scales = quantize(x, FP8_TRAVEL).kept
        return [codes, (scales.view(torch.int32) >> 23).to(torch.uint8)]  # the exponents of powers of two

    def decode(self, columns: list[Tensor]) -> Float[Tensor, "M D"]:
        if not self.fp8:
            return columns[0]
        codes, exponents = columns
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)
        return decode(codes, scales, FP8_TRAVEL, codes.shape[1]).to(self.dtype)

    def there(self, x: Float[Tensor, "N D"]) -> list[Tensor]:
        """→ [M, D], one tensor."""
        columns = self.encode(x)
        for hop in self.hops:
            columns = hop.there(columns)
        return [self.decode(columns)]

    def back(self, y: Float[Tensor, "M D"], *weights: Float[Tensor, "M _"]) -> list[Tensor]:
        """Sums over each token's rows: [N, D], and [N, K] of what belongs to its weights."""
        columns = [y.to(torch.bfloat16) if self.fp8 else y, *weights]
        for hop in reversed(self.hops):
            columns = hop.back(columns)
        out, *others = columns
        if self.copies > 1:
            out = sum_of_rows(out, torch.arange(len(out), device=out.device), self.copies)
        return [out.to(self.dtype), *(w.reshape(len(out), -1) for w in others)]
