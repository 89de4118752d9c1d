"""How many threads this process can keep busy: physical cores that it may use, up to its control group's CPU quota.

A second thread on a core adds little to products that keep its units busy, and threads beyond a quota are all stopped
at once, some of them within a parallel loop that the others wait for.
"""

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own number of threads


@dataclass(frozen=True)
class Cores:
    """hardware_threads, physical: that the process may run on. quota: CPUs that its control group gets; None: all."""

    hardware_threads: int
    physical: int
    quota: float | None
    numa_nodes: int

    @property
    def usable(self) -> int:
        return max(1, min(self.physical, int(self.quota or self.physical)))


def find_cores(root: Path = Path("/")) -> Cores:
    """Of this process. root: of the system's files; where they lack something, every hardware thread counts."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    system = root / "sys/devices/system"
    siblings = {_read(system / f"cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    nodes = [n for n in allowed if (system / f"cpu/cpu{n}").is_dir()]
    places = {node.name for n in nodes for node in (system / f"cpu/cpu{n}").glob("node[0-9]*")}
    return Cores(len(allowed), len(siblings), _quota(root), max(1, len(places)))


def usable_cores() -> int:
    """Threads to run, where the user has not said."""
    return find_cores().usable


def limit_threads() -> None:
    """Call before torch is imported, which takes every hardware thread where its libraries know no better."""
    found = find_cores()
    if not any(name in os.environ for name in VARIABLES) and found.usable < found.hardware_threads:
        os.environ[VARIABLES[0]] = str(found.usable)
        _limited.append(found.usable)


def threads_asked_for() -> str | None:
    """The user's own OMP_NUM_THREADS."""
    return None if _limited else os.environ.get(VARIABLES[0])


_limited: list[int] = []  # what `limit_threads` has set


def _quota(root: Path) -> float | None:
    """CPUs of the control group and those around it: cgroup v2's cpu.max, v1's cpu.cfs_quota_us."""
    found: list[float] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for group in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
            if not group.is_relative_to(base):
                break
            if controllers:
                given = [_read(group / f"cpu.cfs_{what}_us") for what in ("quota", "period")]
            else:
                given = (_read(group / "cpu.max") or "").split()
            if len(given) == 2 and all(given) and given[0] not in ("max", "-1"):
                found.append(float(given[0] or 0) / float(given[1] or 1))
    return min(found, default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
