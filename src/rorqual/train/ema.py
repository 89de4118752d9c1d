"""Exponential moving average of the master weights, kept on the CPU and updated asynchronously (V3 §3.2.3)."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rorqual.train.optimizer import Optimizer

# torch._foreach_*: no public names exist, and the type stubs do not export these.
PIECE = 1 << 15  # elements that torch's operators do in the calling thread alone: the cores are the forward pass's


class EMA:
    """average ← decay·average + (1 − decay)·master after each step; FP32.

    A thread averages while the next step's forward and backward passes run. The optimizer waits for it before the
    masters change, so the average is the same as without the thread. What the thread raises is raised by the next call.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        masters = {name: w.detach() for name, w in optimizer.masters.items()}
        self.average = {name: w.to("cpu", copy=True) for name, w in masters.items()}
        device = next(iter(masters.values())).device if masters else torch.device("cpu")
        self._copies, self._stream = device.type != "cpu", None
        # Where the thread finds the masters; page-locked, so that the copy from a GPU is asynchronous.
        self._masters = masters
        if device.type == "cuda":
            self._masters = {n: t.pin_memory() for n, t in self.average.items()}
            self._stream = torch.cuda.Stream(device)
        elif self._copies:
            self._masters = {n: t.clone() for n, t in self.average.items()}
        self._pieces = _pieces(self.average), _pieces(self._masters)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None
        optimizer.before_change = self.wait

    def update(self) -> None:
        """Begin an update with the masters as they are now."""
        self.wait()
        self._pending = self._thread.submit(self._update, self._copy_to_cpu())

    def wait(self) -> None:
        """Wait for the update that was begun. Raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the averaged weights."""
        self.wait()
        optimizer = self.optimizer
        before = {name: t.clone() for name, t in optimizer.held().items()}
        try:
            _fill({name: optimizer.own[name] for name in self.average}, self.average)
            optimizer.spread()
            yield
        finally:
            _fill(optimizer.held(), before)

    def tensors(self) -> dict[str, Tensor]:
        self.wait()
        return {f"ema.{name}": t for name, t in self.average.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.wait()
        for name, t in self.average.items():
            t.copy_(tensors[f"ema.{name}"])

    def _copy_to_cpu(self) -> torch.cuda.Event | None:
        """Begin the copy from a GPU, on a stream of its own; the event is its end. None: the copies are whole."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for name, copy in self._masters.items() if self._copies else ():
                copy.copy_(self.optimizer.masters[name].detach(), non_blocking=True)
        if self._stream is None:
            return None
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return copied

    @torch.no_grad()
    def _update(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        torch._foreach_lerp_(*self._pieces, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]


def _pieces(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [piece for t in tensors.values() for piece in t.view(-1).split(PIECE)]


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        t.data.copy_(values[name])
