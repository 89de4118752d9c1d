"""A pytest plugin that runs the compiled kernels in a process of their own (host.cpp).

.ci/arm.sh loads it for a library for ARM under QEMU, tests/kernels/test_sanitizers.py for ThreadSanitizer.
RORQUAL_PROXY is the command line of the process; heap.cpp must be loaded before Python.
"""

import atexit
import ctypes
import functools
import os
import struct
import subprocess

import pytest
import torch

from rorqual.engine import paged_kv_cache
from rorqual.kernels import cpu
from rorqual.kernels.cpu import bindings

REQUEST = struct.Struct("56s2q32q8f")  # as in host.cpp
calls: dict[str, int] = {}


class Library:
    """Stands in for the ctypes library: its functions take int, float and None as ctypes' do."""

    def __init__(self, command: list[str]) -> None:
        heap = ctypes.CDLL(None)
        for name in ("heap_start", "heap_size"):
            getattr(heap, name).restype = ctypes.c_size_t
        file = heap.heap_file()
        self._process = subprocess.Popen(
            [*command, str(file), str(heap.heap_start()), str(heap.heap_size())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file],
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        )  # fmt: skip
        atexit.register(self._process.kill)
        assert self.value("interface") == cpu.INTERFACE

    def __getattr__(self, name: str):
        kinds = cpu.SIGNATURES[name.rpartition("_")[0]]

        def function(*values: int | float | None) -> None:
            if len(values) != len(kinds):
                raise TypeError(f"{name} takes {len(kinds)} arguments, not {len(values)}")
            integers = [int(v or 0) for kind, v in zip(kinds, values, strict=True) if kind != cpu.FLOAT]
            numbers = [v for kind, v in zip(kinds, values, strict=True) if kind == cpu.FLOAT]
            self._ask(name, 0, integers, numbers)
            calls[name] = calls.get(name, 0) + 1

        return function

    def value(self, name: str) -> int:
        return self._ask(name, 1, [], [])

    def _ask(self, name: str, value: int, integers: list[int], numbers: list[float]) -> int:
        integers = integers + [0] * (32 - len(integers))
        numbers = numbers + [0.0] * (8 - len(numbers))
        request = REQUEST.pack(name.encode(), value, torch.get_num_threads(), *integers, *numbers)
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer = self._process.stdout.read(8)
        except BrokenPipeError:
            answer = b""
        if len(answer) < 8:
            pytest.exit(f"{name}: the kernels' process ended with {self._process.wait()}", returncode=1)
        return int.from_bytes(answer, "little", signed=True)


# Before collection, since tests query the library when they are imported.
library = Library(os.environ["RORQUAL_PROXY"].split())
torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"  # of a processor that runs `portable`
bindings._library = functools.cache(lambda: ("portable", library))
bindings._number = library.value
# In the heap that both processes have, not in pages of its own.
paged_kv_cache._zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    silent = sorted(name for name in cpu.SIGNATURES if not any(call.rpartition("_")[0] == name for call in calls))
    terminalreporter.write_line(f"{sum(calls.values())} calls of {len(calls)} functions; never called: {silent}")
