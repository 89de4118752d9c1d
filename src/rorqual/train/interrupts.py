"""Stopping cleanly: SIGINT and SIGTERM ask, the loop saves and ends."""

import signal
import threading
from types import FrameType

from rorqual.errors import Stopped


class StopSignals:
    """Within it, SIGINT and SIGTERM set `requested` instead of ending the program; a second one ends it at once.

    Outside the main thread, where Python allows no handlers, it only carries the flag.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        self._before: dict[int, object] = {}

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

    def stopped(self, step: int) -> Stopped:
        """What to raise once the checkpoint of `step` is written."""
        name = signal.Signals(self.number).name
        return Stopped(self.number, f"stopped by {name} at step {step}, saved; continue with --resume")
