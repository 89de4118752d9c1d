"""What travels between the stages of a pipeline: hidden states, and gradients of them.

Multi-token modules, in the last stage, also need embeddings, which stage 0 looks up: their table is on its rank alone,
and each micro-batch's gradient of it is summed there in the order of one process.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from rorqual.parallel.group import Group
from rorqual.plan.schedule import Action, Schedule

HIDDEN, EMBEDDINGS = "hidden states", "embeddings"


@dataclass(frozen=True)
class Parcel:
    """A tensor [B, T, D] from one action to another; of embeddings, [modules, B, T, D]."""

    what: str
    stage: int  # that needs it
    micro_batch: int


@dataclass(frozen=True)
class Flow:
    """The parcels of a schedule, for one of its ranks. embeddings: whether the last stage needs them."""

    schedule: Schedule
    rank: int
    embeddings: bool = False

    def needed(self, action: Action) -> tuple[Parcel, ...]:
        return tuple(parcel for _, parcel in self._ways(action) if parcel.stage == action.stage)

    def made(self, action: Action) -> tuple[Parcel, ...]:
        """Gradients are made in the order in which the forward pass needed what they are of."""
        return tuple(parcel for start, parcel in self._ways(action) if start == action.stage)

    def _ways(self, action: Action) -> Iterator[tuple[int, Parcel]]:
        """(stage that makes it, parcel) of all of the pass's parcels; in the backward pass they go the other way."""
        if action.kind == "W":
            return
        end = self.schedule.stages - 1
        ways = [(HIDDEN, stage, stage + 1) for stage in range(end)] + [(EMBEDDINGS, 0, end)] * self.embeddings
        for what, start, to in ways:
            if action.kind == "F":
                yield start, Parcel(what, to, action.micro_batch)
            else:
                yield to, Parcel(f"gradients of {what}", start, action.micro_batch)

    def to(self, parcel: Parcel) -> int:
        """The rank where it goes."""
        return self.schedule.rank_of_stage[parcel.stage]

    @cached_property
    def by_neighbour(self) -> dict[int, list[Parcel]]:
        """What goes to and comes from each other rank, in one order for both: that of actions, each of which has what
        it needs from those before."""
        found: defaultdict[int, list[Parcel]] = defaultdict(list)
        for rank, step in self.schedule.in_order():
            for parcel in (parcel for action in step for parcel in self.made(action)):
                if (to := self.to(parcel)) != rank and self.rank in (rank, to):
                    found[to if self.rank == rank else rank].append(parcel)
        return dict(found)


class Post:
    """Brings one run's parcels from and to this rank.

    Two ranks begin to send and receive in the same order, that of `Flow.by_neighbour`, and none waits for what comes
    later in it, so they cannot wait for each other. Each message has its number in this order as tag; NCCL, which has
    none, matches in the order itself. Receives begin as early as the order allows: before they are needed.
    """

    def __init__(self, group: Group, flow: Flow, empty: Callable[[Parcel], Tensor]) -> None:
        """empty: a tensor to receive a parcel in."""
        self.group, self.flow, self.empty = group, flow, empty
        self._order = {rank: deque(enumerate(parcels)) for rank, parcels in flow.by_neighbour.items()}
        self._made: dict[Parcel, Tensor] = {}
        self._coming: dict[Parcel, tuple[dist.Work | None, Tensor]] = {}
        self._sent: dict[int, deque[tuple[dist.Work | None, Tensor]]] = {rank: deque() for rank in self._order}
        for rank in self._order:
            self._begin(rank)

    def put(self, parcel: Parcel, tensor: Tensor) -> None:
        self._made[parcel] = tensor
        if (rank := self.flow.to(parcel)) != self.flow.rank:
            self._begin(rank)

    def take(self, parcel: Parcel) -> Tensor:
        if parcel in self._made:  # of another stage here
            return self._made.pop(parcel)
        work, tensor = self._coming.pop(parcel)
        self.group.wait(work, parcel.what)
        return tensor

    def finish(self) -> None:
        """Wait until all has been sent."""
        for rank in self._sent:
            self._wait_for_sent(rank, 0)

    def _begin(self, rank: int) -> None:
        """Begin what is next between this rank and `rank`, up to what is not made yet."""
        order = self._order[rank]
        while order:
            tag, parcel = order[0]
            if self.flow.to(parcel) != rank:
                tensor = self.empty(parcel)
                self._coming[parcel] = self.group.receive(tensor, rank, parcel.what, tag), tensor
            elif parcel in self._made:
                tensor = self._made.pop(parcel).contiguous()
                self._sent[rank].append((self.group.send(tensor, rank, parcel.what, tag), tensor))
                # As many as may be under way in the schedule: the oldest has long arrived.
                self._wait_for_sent(rank, 2 * self.flow.schedule.stages)
            else:
                return
            order.popleft()

    def _wait_for_sent(self, rank: int, left: int) -> None:
        sent = self._sent[rank]
        while len(sent) > left:
            self.group.wait(sent.popleft()[0], "sending to a pipeline stage")
