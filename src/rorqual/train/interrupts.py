"""SIGINT and SIGTERM: the training loop saves a checkpoint and stops; what keeps its work anyway stops at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rorqual.errors import Stopped

Handler = Callable[[int, FrameType | None], object] | int | None


AFTER_STEP = b"stopping after this step; again to stop at once\n"


class StopSignals:
    """Context in which SIGINT and SIGTERM set `requested` and say so; a second signal raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.number = True, number
        with suppress(OSError):
            # Not print, which the signal may have interrupted; on a terminal after the line of the progress bar.
            os.write(2, b"\n" * os.isatty(2) + AFTER_STEP)

    def stopped(self, step: int) -> Stopped:
        """The exception to raise once the checkpoint of `step` is written."""
        name = signal.Signals(self.number).name
        return Stopped(self.number, f"stopped by {name} at step {step}, saved; continue with --resume")


@contextmanager
def stopping_at_once(what: str) -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, with `what` after the signal's name; for work whose finished parts are kept.

    Outside the main thread nothing is installed.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name} {what}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
