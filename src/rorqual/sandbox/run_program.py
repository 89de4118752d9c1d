"""Run model-generated Python in a sandbox: a fresh process without files, network and child processes, time-limited.

`run_program` uses Linux namespaces where the system permits them, else an audit hook with resource limits
(namespaces.py and audit_hook.py describe what each guarantees). Before the first program a probe tries to escape; a
mode it escapes is not used, and without a mode nothing is run.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rorqual.errors import UserError

MODES = ("namespaces", "guard")
CHILD = Path(__file__).with_name("namespaces.py")

PROBE = """
import os
def refused(action):
    try:
        action()
    except (OSError, ImportError, AttributeError):
        return True
    return False
def connect():
    import socket
    socket.create_connection(("127.0.0.1", {port}), timeout=1)
def fork():
    if os.fork() == 0:
        os._exit(0)
assert refused(lambda: open({secret!r}).read()), "a file outside can be read"
assert refused(lambda: open({secret!r} + ".new", "w").write("x")), "a file outside can be written"
assert refused(connect), "the network can be reached"
assert refused(fork), "a process can be started"
"""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20  # address space
    file_bytes: int = 16 * 2**20  # in its working directory
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """`status`: passed (ran to its end), failed, timeout or output (over the limit); `output`: all that it wrote to
    stdout and stderr; `detail`: its end.
    """

    status: str
    output: str
    seconds: float

    @property
    def detail(self) -> str:
        return self.output[-2000:]

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@cache
def isolation() -> str:
    """The strongest mode that the probe cannot escape. Raises UserError when there is none."""
    faults = []
    for mode in MODES:
        try:
            outcome = probe(mode)
        except (OSError, RuntimeError) as e:
            faults.append(f"{mode}: {e}")
            continue
        if outcome.passed:
            return mode
        faults.append(
            f"{mode}: {outcome.detail.strip().splitlines()[-1] if outcome.detail.strip() else outcome.status}"
        )
    raise UserError(
        f"model code cannot be isolated here ({'; '.join(faults)}), so it is not run; "
        "use Linux with user namespaces, or an unprivileged user"
    )


def probe(mode: str) -> Outcome:
    """Run a program that tries to escape: read and write a host file, connect to a host port, start a process."""
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(outside, 0o777)  # so that only the isolation can refuse
        secret = Path(outside, "secret")
        secret.write_text("secret")
        secret.chmod(0o666)
        source = PROBE.format(secret=str(secret), port=server.getsockname()[1])
        return _run(source, Limits(), mode)


def run_program(source: str, limits: Limits | None = None, mode: str | None = None) -> Outcome:
    """Run `source` in isolation; an exception, early exit or exceeded limit is not a pass.

    The surrounding code prints a random word at the end, so that `sys.exit(0)` or `os._exit(0)` do not pass. A program
    that searches the interpreter's frames for that word could still forge it, and read all else in the process: what
    a program must not know, such as expected output, is compared by the caller.
    `mode`: one of MODES; by default the strongest that this machine can establish.
    Raises UserError when isolation cannot be established.
    """
    mode = mode or isolation()
    try:
        return _run(source, limits or Limits(), mode)
    except RuntimeError as e:
        raise UserError(f"the sandbox could not be set up ({e}); model code was not run") from None


def _run(source: str, limits: Limits, mode: str) -> Outcome:
    ready, done = secrets.token_hex(16), secrets.token_hex(16)
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    numbers = {name: int(getattr(limits, name)) for name in ("cpu_seconds", "memory_bytes", "file_bytes")}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rorqual-") as work:
        process = subprocess.Popen(
            [python, "-I", "-S", str(CHILD), mode, python, json.dumps(numbers), work, ready],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            output, cut = _exchange(process, f"{done}\n{source}".encode(errors="replace"), limits)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    seconds = time.monotonic() - started
    before, found, output = output.partition(ready.encode() + b"\n")
    if not found and cut != "timeout":
        raise RuntimeError(before.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {code}")
    ended = output.endswith(done.encode() + b"\n")
    if cut or code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL, -signal.SIGXCPU, -signal.SIGKILL):
        status = cut or "timeout"
    else:
        status = "passed" if ended and code == 0 else "failed"
    return Outcome(status, output.removesuffix(done.encode() + b"\n").decode(errors="replace"), seconds)


def _exchange(process: subprocess.Popen[bytes], text: bytes, limits: Limits) -> tuple[bytes, str]:
    """Write `text` and read the output until its end, the time or the size limit; returns (output, limit hit)."""
    deadline = time.monotonic() + limits.wall_seconds
    output, pending = bytearray(), memoryview(text)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    os.set_blocking(stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is stdin:
                    with suppress(BlockingIOError, BrokenPipeError):
                        pending = pending[os.write(key.fd, pending) :]
                        if pending:
                            continue
                    selector.unregister(stdin)
                    stdin.close()
                    continue
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    return bytes(output), "" if _ends(process, deadline) else "timeout"
                output += chunk
                if len(output) > limits.output_bytes:
                    return bytes(output), "output"
    return bytes(output), "timeout"


def _ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process, after closing its output, also exits before the deadline."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True
