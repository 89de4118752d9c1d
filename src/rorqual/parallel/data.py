"""Data parallelism with ZeRO-1: every rank has the whole weights of its stage, and updates a part of them (V3 §3.2).

Rows (slices of dimension 0) of each parameter are spread over the ranks that hold it: those of the mesh's `tokens`
group, and of `replicas` for routed experts. A step sends gradients once, to the ranks that own the rows, however many
micro-batches were accumulated; these add them in the order of the ranks, update, and send the new rows to the others.
Sums in a fixed order make the result the same on every run, and the bits of one process that accumulates the same
parts one after another.

Muon needs whole matrices: a rank then owns all rows of a matrix, or whole experts of a stack of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.parallel.group import Group
from rorqual.parallel.mesh import Mesh

GRADIENTS, WEIGHTS = "gradients", "weights"
# Parts are multiples of this many elements, as far as there are so many: what vectors leave over is rounded in other
# ways, and 8-bit moments share a scale.
LANES = 256
BUCKET = 64 << 20  # bytes that are sent at once, at most, unless one parameter is larger


def is_expert(name: str) -> bool:
    """Whether a parameter is of routed experts, stacked in dimension 0."""
    return ".mlp.experts." in name


@dataclass(frozen=True)
class Slice:
    """This rank's rows of a parameter in the whole model: the checkpoint's description of a tensor."""

    shape: tuple[int, ...]  # of the whole, all experts included
    first: int
    last: int

    def blocks(self, size: int) -> "Slice":
        """Of what there is one of for so many elements; only the last block of a whole tensor may be partial."""
        row = math.prod(self.shape[1:])
        return Slice((-(-self.shape[0] * row // size),), self.first * row // size, -(-self.last * row // size))


class Sharding:
    """Which rank owns which rows of a model's parameters; gradients to the owners, and weights from them."""

    def __init__(self, mesh: Mesh, parameters: Mapping[str, Tensor], whole: Iterable[str] = ()) -> None:
        """whole: names of matrices that are not cut."""
        self.mesh = mesh
        self.shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        whole = {name for name in whole if len(self.shapes[name]) == 2}
        held = [0] * mesh.tokens.size  # elements of uncut matrices that each place owns
        self.bounds: dict[str, list[int]] = {}  # rows of place p of the group: bounds[p] … bounds[p + 1]
        for name, p in parameters.items():
            rows, n = p.shape[0], self.group(name).size
            if name in whole:
                owner = min(range(n), key=lambda place: held[place])
                held[owner] += p.numel()
                self.bounds[name] = [0] * (owner + 1) + [rows] * (n - owner)
            else:
                unit = LANES // math.gcd(LANES, p.numel() // max(rows, 1))
                part = -(-rows // (n * unit)) * unit
                self.bounds[name] = [min(rows, place * part) for place in range(n + 1)]

    def group(self, name: str) -> Group:
        """The ranks with the same parameter."""
        return self.mesh.replicas if is_expert(name) else self.mesh.tokens

    def rows(self, name: str) -> slice:
        """Of this rank."""
        bounds, place = self.bounds[name], self.group(name).place
        return slice(bounds[place], bounds[place + 1])

    def slice_of(self, name: str) -> Slice:
        rows, shape = self.rows(name), self.shapes[name]
        experts = self.mesh.experts if is_expert(name) else None
        before = shape[0] * experts.place if experts else 0
        total = shape[0] * experts.size if experts else shape[0]
        return Slice((total, *shape[1:]), before + rows.start, before + rows.stop)

    def reduce(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of this rank's tokens → sums over all tokens, of the rows that this rank owns.

        The given ones are freed as they are sent.
        """
        found: dict[str, Tensor] = {}
        for group, names in self._buckets(gradients):
            if group.size == 1:
                found |= {name: gradients.pop(name) for name in names}
                continue
            parts = [
                gradients[n][a:b].flatten() for place in range(group.size) for n, a, b in self._owned(names, place)
            ]
            send = [sum(self._size(n, b - a) for n, a, b in self._owned(names, p)) for p in range(group.size)]
            buffer = torch.cat(parts)
            for name in names:
                del gradients[name]
            mine = send[group.place]
            first, *others = group.all_to_all(buffer, send, [mine] * group.size, GRADIENTS).split(mine)
            for other in others:
                first += other
            self._unpack(first, self._owned(names, group.place), found)
        return {name: g for name, g in found.items() if g.numel()}

    def spread(self, parameters: Mapping[str, Tensor]) -> None:
        """Fill all rows of the parameters from their owners."""
        for group, names in self._buckets(parameters):
            if group.size == 1:
                continue
            owned = [list(self._owned(names, place)) for place in range(group.size)]
            sizes = [sum(self._size(n, b - a) for n, a, b in own) for own in owned]
            mine = torch.cat([parameters[n].data[a:b].flatten() for n, a, b in owned[group.place]])
            mine = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine))])
            for place, buffer in enumerate(group.gather(mine, WEIGHTS)):
                if place != group.place:
                    self._unpack(buffer[: sizes[place]], owned[place], parameters)

    def sizes(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[bool, list[int], int]]:
        """Of what is sent together: is it of routed experts?, bytes of FP32 gradients to each place of the group,
        and bytes of rows to every place.
        """
        for group, names in self._buckets(parameters):
            owned = [sum(self._size(n, b - a) for n, a, b in self._owned(names, p)) for p in range(group.size)]
            yield is_expert(names[0]), [4 * n for n in owned], max(owned) * parameters[names[0]].itemsize

    def _buckets(self, tensors: Mapping[str, Tensor]) -> list[tuple[Group, list[str]]]:
        """Names that are sent together: of the same group and dtype, in the model's order."""
        out: list[tuple[Group, list[str]]] = []
        newest: dict[tuple[bool, torch.dtype], tuple[list[str], int]] = {}
        for name, tensor in tensors.items():
            key = (is_expert(name), tensor.dtype)
            names, size = newest.get(key, ([], BUCKET))
            if size + tensor.nbytes > BUCKET:
                names, size = [], 0
                out.append((self.group(name), names))
            names.append(name)
            newest[key] = names, size + tensor.nbytes
        return out

    def _owned(self, names: Iterable[str], place: int) -> Iterable[tuple[str, int, int]]:
        """(name, first row, end) of what a place owns."""
        return [(name, self.bounds[name][place], self.bounds[name][place + 1]) for name in names]

    def _size(self, name: str, rows: int) -> int:
        return rows * int(torch.Size(self.shapes[name][1:]).numel())

    def _unpack(self, flat: Tensor, owned: Iterable[tuple[str, int, int]], into: Mapping[str, Tensor]) -> None:
        """Fill the rows of `into`, or put them there where they are missing."""
        at = 0
        for name, a, b in owned:
            size = self._size(name, b - a)
            part = flat[at : at + size].view(b - a, *self.shapes[name][1:])
            at += size
            if name in into:
                into[name].data[a:b] = part
            elif isinstance(into, dict):
                into[name] = part


def square_sum(gradients: Iterable[Tensor]) -> float:
    """Of all elements: in FP32 within a row, in FP64 over rows, so that it does not depend on who owns the rows."""
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 else g for g in gradients]
    sums = [part.double().square().sum() for part in rows]
    return sum(torch.stack(sums).tolist()) if sums else 0.0  # one wait for a GPU


def global_norm(mesh: Mesh, gradients: Mapping[str, Tensor], copies: Iterable[str] = ()) -> float:
    """The norm over all ranks' rows; `copies`: names that an earlier stage counts."""
    own = square_sum(g for name, g in gradients.items() if name not in set(copies))
    total = mesh.world.sum(torch.tensor([own], dtype=torch.float64), "gradient norm")
    return float(total.sqrt().float())
