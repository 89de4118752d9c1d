"""What is said of a collective that hangs where no call can raise it.

gloo's calls return when their ranks have taken part, and raise after the time-out. NCCL's put their work on a stream
and return: a hang then shows in whatever waits for the GPU, without a name. Here a thread looks after both: calls that
have not returned, and those whose work on a stream has not ended. It says which one hangs, and ends the process, as
PyTorch's own watchdog would a little later, in its words.

A call costs an object, and on a GPU an event on its stream, which is used again: destroying one may wait for a GPU that
hangs. It keeps no tensor alive. Age is counted in looks of the thread, so the time in which a process was stopped is
none. Like PyTorch's, it begins with the call, and has in it what the stream does before.
"""

import os
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch.distributed.distributed_c10d import Store

from rorqual.kernels.devices import take_gpu

T = TypeVar("T")
LOOK = 1.0  # seconds between two looks
# What can raise comes first, then this watchdog, then PyTorch's: seconds after `parallel.timeout`.
UNRETURNED, PYTORCH = 30.0, 60.0
STORE = 5.0  # seconds that the ranks' store is waited for
MOST = 1 << 16  # calls looked after at once: beyond, new ones are left out until older ones have ended
NAMED = 8  # ranks, at most, in a list of a sentence
UNKNOWN = "another rank has ended, hangs or cannot be reached: its own output says why"


class Event(Protocol):
    """Something that the work of a call is followed by."""

    def query(self) -> bool:
        """Whether it has come."""
        ...


@dataclass(slots=True, eq=False)
class Call:
    """One operation of a group, from its beginning to the end of its work."""

    what: str
    step: int
    ranks: tuple[int, ...]  # of the group
    returned: bool = False
    event: Event | None = None  # after its work; None: that has ended when it returns
    looks: int = 0  # that have found it not ended

    @property
    def name(self) -> str:
        return f"{self.what} of step {self.step}"

    def ended(self) -> bool:
        try:
            return self.returned and (self.event is None or self.event.query())
        except RuntimeError:  # of the GPU, which whoever uses it next is told
            return True


class Watchdog:
    """Looks after the calls of one process, as long as somebody holds it."""

    def __init__(self, rank: int, timeout: timedelta, store: Store | None = None) -> None:
        """store: of all ranks, on a connection of its own; there each says what it waits for, once that has taken half
        of the time-out. None: nothing is known of others.
        """
        self.rank, self.timeout, self.store = rank, timeout, store
        seconds = timeout.total_seconds()
        self.tick = min(LOOK, seconds / 20)
        self._late, self._limit = seconds / 2 / self.tick, seconds / self.tick
        self._new: deque[Call] = deque()
        self._calls: list[Call] = []
        self._events: list[torch.cuda.Event] = []  # to be used again
        self._said = ""
        self._say("")

    def start(self) -> None:
        """Look in a thread from now on, and end the process where a call hangs."""
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        work = weakref.ref(self), self.tick, gpu
        threading.Thread(target=_watch, args=work, name="watchdog", daemon=True).start()

    def begin(self, what: str, step: int, ranks: tuple[int, ...]) -> Call:
        """To be called where an operation begins; then set `returned`, also where it failed."""
        call = Call(what, step, ranks)
        if len(self._new) + len(self._calls) < MOST:
            self._new.append(call)
        return call

    def mark(self, call: Call) -> None:
        """The call's work ends when this thread's stream on the GPU has come here."""
        try:
            event = self._events.pop()
        except IndexError:
            event = torch.cuda.Event()
        event.record()
        call.event = event

    def look(self) -> Call | None:
        """To be called every `tick` seconds → the oldest call that has hung for too long."""
        while self._new:
            self._calls.append(self._new.popleft())
        left: list[Call] = []
        for call in self._calls:
            if not call.ended():
                call.looks += 1
                left.append(call)
            elif isinstance(call.event, torch.cuda.Event):
                self._events.append(call.event)
        self._calls = left
        oldest = max(self._calls, key=lambda call: call.looks, default=None)
        late = oldest.name if oldest is not None and oldest.looks >= self._late else ""
        if late != self._said:
            self._said = late
            self._say(late)
        return max(filter(self._overdue, self._calls), key=lambda call: call.looks, default=None)

    def sentence(self, call: Call, why: str) -> str:
        """On a call that hangs or failed: rank, step, operation, and what other ranks wait for."""
        ranks = ", ".join(map(str, call.ranks))
        return (
            f"rank {self.rank}, step {call.step}: {call.what} among ranks {ranks} did not come through ({why}); "
            f"{self._others(call)}"
        )

    def hanging(self, call: Call) -> str:
        """The sentence on a call that `look` returned."""
        return self.sentence(call, f"nothing for {call.looks * self.tick:.0f} seconds")

    def _overdue(self, call: Call) -> bool:
        return call.looks >= self._limit + (0 if call.returned else UNRETURNED / self.tick)

    def _say(self, name: str) -> None:
        if (store := self.store) is not None:
            _within(STORE, lambda: store.set(_key(self.rank), name))

    def _others(self, call: Call) -> str:
        """What the call's other ranks wait for, as far as they have had the time to say it."""
        store, ranks = self.store, [rank for rank in call.ranks if rank != self.rank]
        if store is None or call.looks < self._late:
            return UNKNOWN
        found = _within(STORE, lambda: store.multi_get([_key(rank) for rank in ranks]))
        if found is None:
            return UNKNOWN
        by_name: defaultdict[str, list[int]] = defaultdict(list)
        for rank, name in zip(ranks, found, strict=True):
            by_name[name.decode()].append(rank)
        by_name.pop(call.name, None)
        if not by_name:
            return "all of them wait for it, so look at the links between them"
        away = by_name.pop("", [])
        said = [f"{_listed(there)} {'wait' if there[1:] else 'waits'} for {name}" for name, there in by_name.items()]
        if away:
            said.append(
                f"{_listed(away)} came much later or not at all: see {'their' if away[1:] else 'its'} own output"
            )
        return "; ".join(said)


def end(sentence: str) -> None:
    """End the process, at once and from any thread, as after an error that a restart may cure."""
    os.write(2, f"rorqual: {sentence}\n".encode())
    os._exit(2)


def _watch(of: "weakref.ref[Watchdog]", tick: float, gpu: int | None) -> None:
    if gpu is not None:
        take_gpu(gpu)  # a new thread would use the machine's first, and its memory
    while True:
        time.sleep(tick)
        if (watchdog := of()) is None:
            return
        if (call := watchdog.look()) is not None:
            end(watchdog.hanging(call))
        del watchdog


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """What it returns; None where it takes longer or fails."""
    found: list[T] = []

    def attempt() -> None:
        try:
            found.append(work())
        except RuntimeError:  # nobody answers
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _key(rank: int) -> str:
    return f"rank {rank} waits for"


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"
