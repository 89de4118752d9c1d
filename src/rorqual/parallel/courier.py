"""Communication beside computation: one thread that travels, and two micro-batches that take turns.

On a CPU the courier is a thread, which waits for the network without the interpreter's lock; on a GPU its work is also
put on a stream of its own. What it is given is done in order, so every rank of a group begins the same collective.

Two micro-batches overlap by taking turns: one computes until it has to wait for tokens that travel, then the other
does (V3 §3.2.1). They change over at these points alone, so every rank changes over at the same ones, and no two
functions ever compute at once.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Trip(Generic[T]):
    """Work of the courier: `result()` waits for it."""

    courier: "Courier"
    future: Future[T]

    def result(self) -> T:
        return self.courier.wait(self)


class Courier:
    """Does what it is given, in order. `background` False: at once, in the caller's thread."""

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self.travelled = self.waited = 0.0  # seconds of work done, and of those that somebody waited for
        self._turns: _Turns | None = None
        self._threads: ThreadPoolExecutor | None = None
        # Kept, since OpenMP makes threads of its own for every thread that computes.
        self._second = ThreadPoolExecutor(1, "second micro-batch", initializer=_take_gpu, initargs=_gpu())
        self._stream: Any = None

    def submit(self, work: Callable[..., T], *arguments: Any) -> Trip[T]:
        if not self.background:
            done: Future[T] = Future()
            start = time.perf_counter()
            done.set_result(work(*arguments))
            self.travelled += (passed := time.perf_counter() - start)
            self.waited += passed
            return Trip(self, done)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "courier", initializer=_take_gpu, initargs=_gpu())
        event = _recorded() if torch.cuda.is_initialized() else None  # it is where anything is on a GPU
        return Trip(self, self._threads.submit(self._travel, event, torch.is_grad_enabled(), work, *arguments))

    def wait(self, trip: Trip[T]) -> T:
        if self._turns is not None:
            self._turns.switch()
        if not self.background:
            return trip.future.result()
        start = time.perf_counter()
        try:
            return _used_here(trip.future.result())
        finally:
            self.waited += time.perf_counter() - start

    def together(self, first: Callable[[], T], second: Callable[[], U]) -> tuple[T, U]:
        """Both results; wherever one of them waits for a trip, the other goes on."""
        if not self.background:
            return first(), second()
        assert self._turns is None
        self._turns = _Turns()
        try:
            return self._turns.run(first, second, self._second)
        finally:
            self._turns = None

    @property
    def hidden(self) -> float:
        """The share of the travelling time in which nobody waited."""
        return max(0.0, 1 - self.waited / self.travelled) if self.travelled else 0.0

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        self._second.shutdown()

    def _travel(self, event: Any, grad: bool, work: Callable[..., T], *arguments: Any) -> T:
        start = time.perf_counter()
        try:
            with torch.set_grad_enabled(grad):  # of the caller: it is a setting of each thread
                if event is None:
                    return work(*arguments)
                return self._on_stream(event, work, *arguments)
        finally:
            self.travelled += time.perf_counter() - start

    def _on_stream(self, event: Any, work: Callable[..., T], *arguments: Any) -> T:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            out = work(*arguments)
            self._stream.synchronize()  # of this thread alone: the caller's stream goes on computing
        return out


def _gpu() -> tuple[int, ...]:
    """The GPU of this thread; empty where none is used."""
    return (torch.cuda.current_device(),) if torch.cuda.is_initialized() else ()


def _take_gpu(*gpu: int) -> None:
    """Of a new thread, which would have the machine's first."""
    for index in gpu:
        torch.cuda.set_device(index)


def _used_here(found: T) -> T:
    """Keep the memory of tensors that were made on the courier's stream until this one has read them."""
    for tensor in found if isinstance(found, list) else ():
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())
    return found


def _recorded() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


class _Turns:
    """Two functions, each in a thread, of which one runs at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._running = [True, True]

    def run(self, first: Callable[[], T], second: Callable[[], U], thread: Executor) -> tuple[T, U]:
        found: list[Any] = [None, None]
        errors: list[BaseException] = []
        grad = torch.is_grad_enabled()

        def lane(number: int, work: Callable[[], Any]) -> None:
            try:
                if number:
                    self._wait_for(number)
                with torch.set_grad_enabled(grad):
                    found[number] = work()
            except BaseException as e:
                errors.append(e)
            finally:
                with self._changed:
                    self._running[number] = False
                    self._turn = 1 - number
                    self._changed.notify_all()

        other = thread.submit(lane, 1, second)
        lane(0, first)
        other.result()
        if errors:
            raise errors[0]
        return found[0], found[1]

    def switch(self) -> None:
        """Let the other function go on, and return when it waits in its turn or has ended."""
        with self._changed:
            number = self._turn  # the caller's, also where autograd runs a GPU's backward pass in a thread of its own
            if not self._running[1 - number]:
                return
            self._turn = 1 - number
            self._changed.notify_all()
        self._wait_for(number)

    def _wait_for(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number or not self._running[1 - number])
