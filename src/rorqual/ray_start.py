"""Join a Ray cluster, or start Ray on this machine."""

import os
from collections.abc import Sequence
from typing import Any

from rorqual.errors import UserError

LOCAL = "local"
START_ATTEMPTS = 3  # a busy machine is too slow for Ray's own limits on its first start


def join_ray(ray: Any, address: str, said: str, local: dict[str, Any] | None = None, **options: Any) -> None:
    """ray: the package. address: of a cluster, "auto", or "local", which takes the options `local` too. said: the
    option or variable that the address is from, for errors. Raises UserError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are the run, not guests beside it
    options |= {"log_to_driver": False, "logging_level": "ERROR"}
    if address != LOCAL:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise UserError(
                f"{said} {address}: no cluster is reached ({reason(e)}); start one with `ray start --head`, and "
                "this command on one of its machines"
            ) from e
        return
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address=LOCAL, include_dashboard=False, **options, **(local or {}))
            return
        except Exception as e:  # Ray raises plain Exceptions here
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise UserError(f"{said} {LOCAL}: Ray does not start ({reason(e)}); see /tmp/ray") from e


def cpus_of_machines(ray: Any) -> list[int]:
    """Of the cluster's machines that are alive."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def fair_threads(cpus: Sequence[int], workers: int, most: Sequence[int] | None = None) -> int:
    """The most threads of which all workers have as many, on machines with `cpus`; 1 where there is no room for all.

    most: see `room`.
    """
    threads = max(1, sum(cpus) // workers)
    while threads > 1 and room(cpus, threads, most) < workers:
        threads -= 1
    return threads


def room(cpus: Sequence[int], threads: int, most: Sequence[int] | None = None) -> int:
    """For workers of so many threads; most: of each machine, for want of something else."""
    return sum(min(n // threads, limit) for n, limit in zip(cpus, most or cpus, strict=True))


def reason(error: BaseException) -> str:
    """One line of an error of Ray, which writes many: the first, but for an actor that cannot start."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "creation task" in lines[0] else 0][:200].rstrip(".")
