"""Contestants in processes of their own, which take turns: one that crashes or crawls takes nobody along.

A contestant is what a function or class makes, named "module:name". Its process makes it, and then calls one of its
methods whenever it is told to, while the others wait. What it raises, the signal it dies of, or the time it exceeds
becomes a sentence, and it is out; the others go on.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

INHERITED = dict(os.environ)  # before tune() changes it
FOLDER = Path(__file__).parent
PR_SET_PDEATHSIG = 1  # Linux's prctl.h


class Failed(Exception):
    """Why a contestant is out, in a sentence."""


class Worker:
    """One contestant. `step` and `whole`: the seconds that a turn, and all its turns together, may take.

    ours: its process is set up as the command `rorqual` is, before torch is loaded; a peer gets the allocator's setting
    only, which it also had when it shared our process, since a short spin of OpenMP's threads may slow it down.
    """

    def __init__(
        self, make: str, arguments: Sequence[Any], step: float, whole: float, ours: bool, environment: dict[str, str]
    ) -> None:
        self.step, self.whole, self._spent = step, whole, 0.0
        self._mine, its = Pipe()
        code = f"import sys; sys.path[0] = {str(FOLDER)!r}; import workers; workers.serve({its.fileno()}, {ours})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=INHERITED | environment, pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL, stdout=2,  # stdout is the table's
            start_new_session=True,  # so that what it starts ends with it
        )  # fmt: skip
        its.close()  # so that the pipe ends with the process
        try:
            self._ask("start", (make, arguments))
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the method returns. Raises Failed; the process has ended then."""
        return self._ask(method, (method, arguments))

    def close(self) -> None:
        """Idempotent."""
        if self._mine.closed:
            return  # its number may be another process's by now
        self._mine.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, what: str, message: Any) -> Any:
        limit = min(self.step, self.whole - self._spent)
        start = time.monotonic()
        try:
            self._mine.send(message)
            answered = self._mine.poll(max(0.0, limit))
            fine, value = self._mine.recv() if answered else (False, "")
        except (EOFError, OSError):
            fine, value = False, self._death()
        self._spent += time.monotonic() - start
        if fine:
            return value
        self.close()
        over = f"over {self.step:g} s" if limit == self.step else f"over {self.whole:g} s in all"
        raise Failed(f"{value or over} ({what})")

    def _death(self) -> str:
        try:
            code = self._process.wait(10)  # the pipe ends before the process has
        except subprocess.TimeoutExpired:
            return "crashed: it closed the pipe"
        if code >= 0:
            return f"crashed: exit code {code}"
        name = signal.Signals(-code).name
        return f"crashed: {name}" + (", as when memory runs out" if name == "SIGKILL" else "")


class Field:
    """Contestants by name. `failed`: those that are out, with a sentence for each."""

    def __init__(self, step: float, whole: float) -> None:
        self.step, self.whole = step, whole
        self.failed: dict[str, str] = {}
        self.ours: set[str] = set()
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *_: Any) -> None:
        for name in list(self._workers):
            self.leave(name)

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def enter(
        self, name: str, make: str, *arguments: Any, ours: bool = False, environment: dict[str, str] | None = None
    ) -> bool:
        """Start a contestant; whether it is there."""
        if ours:
            self.ours.add(name)
        print(f"{name}: starting", file=sys.stderr, flush=True)
        try:
            self._workers[name] = Worker(make, arguments, self.step, self.whole, ours, environment or {})
        except Failed as e:
            self.out(name, str(e))
        return name in self

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """What the contestant's method returns; None where it is out, or is from now on."""
        if name not in self:
            return None
        try:
            return self._workers[name].ask(method, *arguments)
        except Failed as e:
            self.leave(name)
            self.out(name, str(e))
            return None

    def turns(self, names: Iterable[str], method: str, arguments: Sequence[Any], rounds: int) -> dict[str, list[Any]]:
        """What the method returns of each, `rounds` times in turn, so that a busy moment of the machine meets all of
        them; only of those that came through every round."""
        found: dict[str, list[Any]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, values in found.items():
                if (value := self.ask(name, method, *arguments)) is not None:
                    values.append(value)
        return {name: values for name, values in found.items() if len(values) == rounds}

    def leave(self, name: str) -> None:
        """End a contestant that is not needed any more."""
        if (worker := self._workers.pop(name, None)) is not None:
            worker.close()

    def out(self, name: str, sentence: str) -> None:
        self.failed[name] = sentence
        print(f"{name}: {sentence}", file=sys.stderr, flush=True)


# -- in a contestant's process

_asks: Connection


def serve(fd: int, ours: bool) -> None:
    """Make the contestant and do what is asked, until the pipe ends."""
    global _asks
    _asks = Connection(fd)
    if sys.platform == "linux":  # a benchmark that is killed leaves nobody behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        from rorqual.process_tuning import tune
    except ModuleNotFoundError:  # an older version of ours that this one is compared with
        from rorqual.process import tune

    if ours:
        tune()
    make, arguments = _asks.recv()
    try:
        module, _, name = make.partition(":")
        made = getattr(importlib.import_module(module), name)
        tune()
        contestant = made(*arguments)
        answer(None)
        while True:
            gc.collect()
            answer(getattr(contestant, _asked[0])(*_asked[1]))
    except EOFError:
        return
    except Exception as e:
        traceback.print_exc()
        first = (str(e).strip().splitlines() or ["no message"])[0][:160]
        _asks.send((False, f"{type(e).__name__}: {first}"))


_asked: tuple[str, Sequence[Any]]


def answer(value: Any) -> None:
    """Answer what was asked, and wait for the next. For a peer whose own loop calls us, once for every ask."""
    global _asked
    _asks.send((True, value))
    _asked = _asks.recv()


def timed(owner: Any, name: str) -> list[float]:
    """Replaces a method by one that notes how long each call takes."""
    method, found = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            found.append(time.perf_counter() - start)

    setattr(owner, name, call)
    return found
