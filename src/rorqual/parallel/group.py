"""Process groups: their collectives, the bytes these send over each kind of link, and what is said when one hangs.

A link is slow between nodes and fast within one. Bytes are those handed to the backend (gloo, NCCL), without what a
rank keeps for itself; the transport's own headers come on top.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.errors import UserError
from rorqual.parallel.watchdog import Watchdog
from rorqual.plan.expected_rows import Link


@dataclass
class Traffic:
    """Bytes that this rank has sent, by (operation, link), and the step that a time-out names."""

    sent: Counter[tuple[str, Link]] = field(default_factory=Counter[tuple[str, Link]])
    step: int = 0

    def total(self, link: Link, *operations: str) -> int:
        """Over `operations`, or all of them."""
        return sum(
            n for (what, where), n in self.sent.items() if where == link and (not operations or what in operations)
        )


@dataclass(frozen=True)
class Group:
    """Some ranks, in order, one of which is this process; `traffic` is shared by all groups of a process."""

    process_group: dist.ProcessGroup | None  # None: this process alone
    ranks: tuple[int, ...]  # global
    place: int  # of this process among them
    ranks_per_node: int
    traffic: Traffic
    watchdog: Watchdog | None = None  # None: this process alone

    @property
    def size(self) -> int:
        return len(self.ranks)

    def node(self, place: int) -> int:
        """Of the group's rank at `place`."""
        return self.ranks[place] // self.ranks_per_node

    def link(self, place: int) -> Link:
        """From here to a place."""
        return "within a node" if self.node(place) == self.node(self.place) else "between nodes"

    def count(self, what: str, nbytes: Sequence[int]) -> None:
        """Add the bytes sent to each place to the traffic."""
        for place, number in enumerate(nbytes):
            if place != self.place and number:
                self.traffic.sent[what, self.link(place)] += number

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Tensor:
        """Rows [M, …] in order of their destinations, send[p] of them to place p → the rows received, receive[p] of
        them from place p.
        """
        if self.process_group is None:
            return rows
        row = rows[0].nbytes if len(rows) else 0
        self.count(what, [n * row for n in send])
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        with self.named(what, on_gpu=out.is_cuda):
            dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), self.process_group)
        return out

    def exchange_counts(self, counts: Tensor, what: str) -> Tensor:
        """counts [size, …]: row p to place p → row p from place p."""
        return self.all_to_all(counts, [1] * self.size, [1] * self.size, what)

    def gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """The tensor of every place; shapes are the same."""
        if self.process_group is None:
            return [tensor]
        self.count(what, [tensor.nbytes] * self.size)
        out = [torch.empty_like(tensor) for _ in self.ranks]
        with self.named(what, on_gpu=tensor.is_cuda):
            dist.all_gather(out, tensor.contiguous(), self.process_group)
        return out

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """Over all places, added in their order: the same bits everywhere, and as one process adds them."""
        first, *others = self.gather(tensor, what)
        total = first.clone()
        for other in others:
            total += other
        return total

    def send(self, tensor: Tensor, place: int, what: str, tag: int = 0) -> dist.Work | None:
        """Begin to send; the tensor must stay as it is until the work returned has been waited for.

        It comes to the receive with its tag; with NCCL, which has none, in the order in which two ranks send and
        receive, which must be the same on both.
        """
        self.count(what, [tensor.nbytes if p == place else 0 for p in range(self.size)])
        with self.named(what):
            return dist.isend(tensor, self.ranks[place], self.process_group, tag)

    def receive(self, tensor: Tensor, place: int, what: str, tag: int = 0) -> dist.Work | None:
        """Begin to receive into `tensor`."""
        with self.named(what):
            return dist.irecv(tensor, self.ranks[place], self.process_group, tag)

    def wait(self, work: dist.Work | None, what: str) -> None:
        if work is not None:
            assert self.watchdog is not None
            with self.named(what):
                work.wait(self.watchdog.timeout)

    def barrier(self, what: str) -> None:
        self.gather(torch.zeros(1), what)

    @contextmanager
    def named(self, what: str, on_gpu: bool = False) -> Iterator[None]:
        """Context of an operation of the group: where it fails or hangs, a sentence says rank, step and operation.

        on_gpu: its work is on this thread's stream when the block ends. Raises CommunicationError where the backend
        fails.
        """
        assert self.watchdog is not None
        call = self.watchdog.begin(what, self.traffic.step, self.ranks)
        try:
            yield
            if on_gpu:
                self.watchdog.mark(call)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise CommunicationError(self.watchdog.sentence(call, _first_line(e))) from e
        finally:
            call.returned = True


class CommunicationError(UserError):
    """A collective failed or timed out."""

    retry = True


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
