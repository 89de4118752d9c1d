"""Servers as processes: how each is started and ended."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 600  # seconds for a server to come up; vLLM compiles first


@dataclass(frozen=True)
class Contestant:
    """A server in one of its formats. `command` lacks only the port."""

    side: str
    format: str
    command: tuple[Any, ...]
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    guesses: bool = False  # it speculates, by what came before

    def __str__(self) -> str:
        return f"{self.side} {self.format}"


class Server:
    """A contestant that runs, on `port` of loopback. Raises RuntimeError, with what it said last, if it does not."""

    def __init__(self, contestant: Contestant, patience: float = PATIENCE) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
        self._process = subprocess.Popen(
            [*map(str, contestant.command), "--host", "127.0.0.1", "--port", str(self.port)],
            env=os.environ | contestant.environment, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that signals reach its workers too
        )  # fmt: skip
        try:
            self._wait(patience)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._log.closed:
            return  # its number may be another process's by now
        self._log.close()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def death(self) -> str | None:
        """How it ended, if it has."""
        try:
            code = self._process.wait(1)  # a connection ends before the process has
        except subprocess.TimeoutExpired:
            return None
        return f"crashed: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def _wait(self, patience: float) -> None:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as found:
                    if found.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        last = ([line for line in said if "Error" in line] or said)[-1]
        raise RuntimeError(f"{self.death() or f'over {patience:g} s'}: {last}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
