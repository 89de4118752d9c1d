"""The user's own functions, loaded from a file or a module; and a process to call one with a time limit.

A function that hangs cannot be interrupted from another thread. Here the whole process is killed after the time-out,
and started again for the next call. Requests are pickles of this process's own objects, replies one JSON object per
line. This file is also the script of that process, where it imports nothing of the package.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

START_TIMEOUT = 120.0  # seconds to load the user's file, and what it imports, on a busy machine


class FunctionError(Exception):
    """A call gave no number; the message is the reason."""


def load(spec: str) -> Any:
    """The object that `spec` names: FILE.py:NAME, or MODULE:NAME of an installed package.

    The folder of a file can be imported from. Raises what importing it raises, LookupError where it has no such name,
    and FileNotFoundError.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        raise LookupError("there is no :NAME after the file")
    if not place.endswith(".py"):
        module = importlib.import_module(place)
    else:
        path = Path(place).resolve()
        unique = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if unique not in sys.modules:
            if not path.is_file():
                raise FileNotFoundError(f"{place} does not exist")
            found = importlib.util.spec_from_file_location(unique, path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            if str(path.parent) not in sys.path:
                sys.path.append(str(path.parent))
            sys.modules[unique] = module
            try:
                found.loader.exec_module(module)
            except BaseException:
                del sys.modules[unique]
                raise
        module = sys.modules[unique]
    if not hasattr(module, name):
        defined = [key for key, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
        raise LookupError(f"it has no {name}, only {', '.join(defined) or 'no function or class'}")
    return getattr(module, name)


def build(spec: str, config: Mapping[str, Any]) -> Any:
    """What `load` finds; an object of it, made with `config`, where it is a class."""
    found = load(spec)
    return found(**config) if inspect.isclass(found) else found


class FunctionWorker:
    """Calls the function `spec`, or a method of an object of the class `spec`, in a process started at the first call.

    What it prints is on this process's standard error.
    """

    def __init__(self, spec: str, timeout: float, config: Mapping[str, Any] | None = None, method: str = "") -> None:
        """timeout: seconds of a call."""
        self.spec, self.timeout, self.config, self.method = spec, timeout, dict(config or {}), method
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, arguments: Mapping[str, Any]) -> float:
        """The function's value. Raises FunctionError where it raises, takes too long, ends its process or returns
        something other than a finite number.
        """
        try:
            request = pickle.dumps(dict(arguments))
        except Exception as e:  # of any type: objects define how they are pickled
            raise FunctionError(f"its arguments cannot be sent to another process ({_reason(e)})") from None
        with self._lock:
            process = self._process or self._start()
            try:
                requests, _ = _pipes(process)
                requests.write(len(request).to_bytes(8, "big") + request)
                requests.flush()
                reply = _read(process, self.timeout)
            except OSError:
                reply = b""
            if not reply:
                self._stop()
                died = f"it took longer than {self.timeout:g} seconds" if reply is None else "it ended its process"
                raise FunctionError(died)
            return _value(reply)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> "subprocess.Popen[bytes]":
        settings = json.dumps([self.spec, self.config, self.method, self.timeout])
        # -P: this file's folder must not shadow library modules. The hashes of texts, and so the order of sets, are the
        # same in every process.
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", __file__, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # a Ctrl-C for the trainer must not kill it
        )
        self._end = weakref.finalize(self, _kill, process)  # also at the end of the program
        try:
            ready = _read(process, START_TIMEOUT)
            if not ready:
                late = f"loading {self.spec} took longer than {START_TIMEOUT:g} seconds"
                raise FunctionError(late if ready is None else f"loading {self.spec} ended its process")
            _value(ready)
        except FunctionError:
            self._stop()
            raise
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process = None
            self._end()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        with contextlib.suppress(OSError):  # unflushed data has no reader
            pipe.close()


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    """Its stdin and stdout."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _read(process: "subprocess.Popen[bytes]", timeout: float) -> bytes | None:
    """Its next line; None after `timeout` seconds, empty at its end."""
    _, replies = _pipes(process)
    with selectors.DefaultSelector() as selector:
        selector.register(replies, selectors.EVENT_READ)
        if not selector.select(timeout):
            return None
    return replies.readline()


def _value(reply: bytes) -> float:
    found = json.loads(reply)
    if "error" in found:
        raise FunctionError(found["error"])
    return found["value"]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:200]


def number(value: object) -> float:
    """A reward as a float; also of NumPy and PyTorch. Raises FunctionError for anything else, NaN and infinities."""
    try:
        found = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise FunctionError(f"it returned {value!r:.60}, not a number") from None
    if isinstance(value, str) or not math.isfinite(found):
        raise FunctionError(f"it returned {value!r:.60}, not a finite number")
    return found


def _serve() -> None:
    spec, config, method, timeout = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # prints of the function must not be read as replies

    def answer(make: Callable[[], float]) -> None:
        try:
            reply: dict[str, Any] = {"value": make()}
        except FunctionError as e:
            reply = {"error": str(e)}
        except Exception as e:  # of any type: it is the user's code
            reply = {"error": f"it raised {_reason(e)}"}
        replies.write(json.dumps(reply).encode() + b"\n")

    functions: list[Callable[..., object]] = []

    def start() -> float:
        found = build(spec, config)
        functions.append(getattr(found, method) if method else found)
        return 0.0

    answer(start)
    while head := sys.stdin.buffer.read(8):
        request = sys.stdin.buffer.read(int.from_bytes(head, "big"))
        signal.alarm(math.ceil(timeout) + 5)  # ends this process also where the one that waits was killed
        answer(lambda read=request: number(functions[0](**pickle.loads(read))))
        signal.alarm(0)


if __name__ == "__main__":
    _serve()
