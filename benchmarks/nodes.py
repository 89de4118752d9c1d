"""Nodes on one Linux machine: a network namespace each, with links of a given rate between them.

Ranks of a node talk within its namespace, as fast as memory. Between nodes they talk through a virtual cable to a
switch, a namespace with a bridge; both ends of the cable let `rate` bit/s pass (tc's token bucket). Namespaces take
root and the commands ip and tc. Without them the ranks share the machine's network as it is (`real` is False), and
`delayed` lets a rank wait before it sends to another node.

    with Nodes(2, rate=1e9) as nodes:
        nodes.start_ranks([sys.executable, "train.py"], ranks_per_node=4)
        nodes.wait(600)
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rorqual.errors import UserError
from rorqual.parallel.group import Group
from rorqual.parallel.mesh import Mesh

INTERFACE = "eth0"  # of a node, in its namespace
MADE = re.compile(r"rorqual-(\d+)-\w+")  # our namespaces, by the process that made them


class Nodes:
    """`rate`: bit/s that a node can send, and as many that it can receive. `real`: whether there are namespaces."""

    def __init__(self, nodes: int = 2, rate: float = 1e9) -> None:
        self.nodes, self.rate = nodes, rate
        self.real, self.why = False, ""  # why not
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> "Nodes":
        try:
            _remove_stale()
            self._make()
            self.real = True
        except FileNotFoundError as e:
            self.why = f"the command {e.filename} is not here"
        except subprocess.CalledProcessError as e:
            self.why = (e.stderr.strip().splitlines() or [f"{e.cmd[0]} failed"])[-1]
        if not self.real:
            self._remove()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._remove()

    def address(self, node: int) -> str:
        return _address(node) if self.real else "127.0.0.1"

    def start(
        self, command: Sequence[str], node: int, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process on a node, which ends with us, as does what it starts. `env` is added to ours; `options` are
        Popen's."""
        environment = {**os.environ, **(env or {})}
        if self.real:
            environment["GLOO_SOCKET_IFNAME"] = INTERFACE
            command = ["ip", "netns", "exec", self._name(node), *command]
        self._started.append(subprocess.Popen(command, env=environment, start_new_session=True, **options))
        return self._started[-1]

    def start_ranks(
        self, command: Sequence[str], ranks_per_node: int, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        """Start the command once for every rank, with torchrun's variables."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        for rank in range(self.nodes * ranks_per_node):
            own = {
                "RANK": rank, "LOCAL_RANK": rank % ranks_per_node, "WORLD_SIZE": self.nodes * ranks_per_node,
                "LOCAL_WORLD_SIZE": ranks_per_node, "MASTER_ADDR": self.address(0), "MASTER_PORT": port,
            }  # fmt: skip
            own = {name: str(value) for name, value in own.items()}
            self.start(command, rank // ranks_per_node, {**own, **(env or {})}, **options)

    def wait(self, limit: float) -> None:
        """Until all processes have ended. Raises UserError when one of them fails, or after `limit` seconds."""
        end = time.monotonic() + limit
        while None in (codes := [process.poll() for process in self._started]):
            if any(codes):
                break
            if time.monotonic() > end:
                raise UserError(f"processes on {self.nodes} nodes took over {limit:g} s; allow more, or give less work")
            time.sleep(0.05)
        for number, code in enumerate(codes):
            if code:
                raise UserError(
                    f"process {number} on {self.nodes} nodes ended with status {code}; its own output says why"
                )

    def _name(self, node: int | str) -> str:
        return f"rorqual-{os.getpid()}-{node}"

    def _make(self) -> None:
        switch = self._name("switch")  # a bridge of its own namespace, which no firewall of the machine's filters
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for node in range(self.nodes):
            name, port = self._name(node), f"port{node}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{_address(node)}/16", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
            for namespace, interface in ((name, INTERFACE), (switch, port)):
                # A bucket of a millisecond, and of at least two of the kernel's largest packets.
                bucket = f"{max(131072, round(self.rate / 8000))}b"
                shape = ["tbf", "rate", f"{self.rate:.0f}bit", "burst", bucket, "latency", "50ms"]
                _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *shape)

    def _remove(self) -> None:
        for name in _namespaces(os.getpid()):
            _remove(name)


def wire_bytes() -> int | None:
    """What the node of this process has sent to others so far, with the headers of every packet; None if not real."""
    if os.environ.get("GLOO_SOCKET_IFNAME") != INTERFACE:
        return None
    try:
        (queue,) = json.loads(_run("tc", "-s", "-j", "qdisc", "show", "dev", INTERFACE, "root"))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return queue["bytes"]


# -- without namespaces


@dataclass(frozen=True)
class DelayedGroup(Group):
    """Waits before it sends to another node, as long as the bytes would take."""

    rate: float = 1e9  # bit/s of a rank

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Tensor:
        away = sum(n for place, n in enumerate(send) if self.node(place) != self.node(self.place))
        if away:
            time.sleep(away * rows[0].nbytes * 8 / self.rate)
        return super().all_to_all(rows, send, receive, what)


def delayed(mesh: Mesh, rate: float) -> Mesh:
    """The mesh with waits on the way to experts; a node's ranks send at once, so each has a part of `rate`."""

    def group(group: Group) -> Group:
        return DelayedGroup(**vars(group), rate=rate / group.ranks_per_node)

    return replace(mesh, experts=group(mesh.experts), rail=group(mesh.rail))


# -- namespaces of the machine


def _address(node: int) -> str:
    return f"10.77.{node // 250}.{node % 250 + 1}"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _namespaces(of: int | None = None) -> dict[str, int]:
    """Ours, and the processes that made them."""
    folder = Path("/run/netns")
    found = {name: int(m[1]) for name in (os.listdir(folder) if folder.is_dir() else []) if (m := MADE.fullmatch(name))}
    return {name: maker for name, maker in found.items() if of in (None, maker)}


def _remove_stale() -> None:
    """Those whose maker was killed, and those of a former process with our number."""
    for name, maker in _namespaces().items():
        if maker == os.getpid() or not Path(f"/proc/{maker}").exists():
            _remove(name)


def _remove(name: str) -> None:
    """With the processes in it; its end of the cables goes with it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for process in _run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        _run("ip", "netns", "del", name)
