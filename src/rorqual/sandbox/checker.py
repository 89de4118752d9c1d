"""A separate process for checkers that evaluate model output, and for the first problems of a config.

sympy (in math-verify and some of reasoning-gym's checkers) can hang or exhaust the memory on a short string. So can a
generator whose config asks for a number of 10^30 digits. Neither can be interrupted from another thread: here the
whole process is killed after the time-out and restarted. Requests and replies are one JSON object per line. This file
is also the script of that process, where it imports nothing of the package.
"""

import atexit
import contextlib
import json
import selectors
import subprocess
import sys
import threading
from typing import IO, Any

START_TIMEOUT = 120.0  # seconds to import sympy and the checkers on a busy machine
MEMORY = 4 << 30  # bytes of address space for the process


class CheckerProcess:
    """One checker process, started at the first call; thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def call(self, request: dict[str, Any], timeout: float) -> float | None:
        """The checker's score; None where it took longer than `timeout` seconds, failed or died."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # killed from outside between two calls
            process = self._process or self._start()
            if process is None:
                return None
            requests, _ = _pipes(process)
            try:
                requests.write(json.dumps(request, default=str).encode() + b"\n")
                requests.flush()
            except OSError:
                self._stop()
                return None
            line = _read(process, timeout)
            if line is None:
                self._stop()
                return None
            return json.loads(line)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes] | None:
        from rorqual.extras import require  # not at the top: the script imports nothing of the package

        require("rl")  # without them every answer that is checked here would count as wrong
        # -P: this file's folder must not shadow library modules.
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C for the trainer must not kill it
        )
        if _read(process, START_TIMEOUT) is None:
            self._stop()
            return None
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in _pipes(process):
                with contextlib.suppress(OSError):  # unflushed data has no reader
                    pipe.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Its stdin and stdout."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _read(process: subprocess.Popen[bytes], timeout: float) -> bytes | None:
    """Its next line; None after `timeout` seconds, and at its end."""
    _, replies = _pipes(process)
    with selectors.DefaultSelector() as selector:
        selector.register(replies, selectors.EVENT_READ)
        if not selector.select(timeout):
            return None
    return replies.readline() or None


_shared = CheckerProcess()
atexit.register(_shared.close)


def shared_checker() -> CheckerProcess:
    """The process-wide checker."""
    return _shared


def _math(request: dict[str, Any]) -> float:
    """Parse both texts as LaTeX and as a whole: math-verify must not pick an expression from the middle of a text."""
    from math_verify import LatexExtractionConfig, parse, verify

    gold, answer = (
        parse(f"${request[name].replace('$', ' ')}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=0)
        for name in ("gold", "answer")
    )
    return float(verify(gold, answer, timeout_seconds=None))


def _reply(request: dict[str, Any]) -> float:
    """Let math-verify find the answer in a whole reply, with its own settings."""
    from math_verify import parse, verify

    gold = parse(f"${request['gold'].replace('$', ' ')}$", parsing_timeout=0)
    return float(verify(gold, parse(request["reply"], parsing_timeout=0), timeout_seconds=None))


def _gym(request: dict[str, Any]) -> float:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(request["name"], **request["config"])
    return float(dataset.score_answer(request["answer"], request["entry"]))


def _make(request: dict[str, Any]) -> float:
    """1 when the config's first problems are made; 0 where the dataset refuses one, which the caller finds again."""
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(request["name"], seed=0, size=request["count"], **request["config"])
        for i in range(request["count"]):  # they differ in size
            dataset[i]
    except MemoryError:
        raise
    except Exception:  # of any type: datasets assert, divide by zero, …
        return 0.0
    return 1.0


def _serve() -> None:
    import logging
    import os
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if limit < 0 else min(MEMORY, limit), limit))
    logging.disable()
    import math_verify  # noqa: F401  (before the ready line, so that its import counts against no time-out)

    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # prints of a checker must not be read as replies
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        result = None
        with contextlib.suppress(Exception):
            result = {"math": _math, "reply": _reply, "gym": _gym, "make": _make}[request["task"]](request)
        replies.write(json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    _serve()
