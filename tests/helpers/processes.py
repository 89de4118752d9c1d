"""Run a function of a test module in several processes that form a process group."""

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Its server imports torch once, in one thread; each process is then a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "rorqual.engine", "rorqual.train.training_run", "rorqual.parallel.experts"])
LIMIT = 120  # seconds


def run(processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(rank, *arguments) in each process, joined by gloo → what they return, by rank; raises where one did."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(processes)]
        started = [
            CONTEXT.Process(target=_enter, args=(rank, processes, folder, theirs, function, arguments))
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in started:
            process.start()
        for _, theirs in ends:
            theirs.close()
        try:
            return _collect([ours for ours, _ in ends])
        finally:
            for process in started:
                process.kill()
                process.join()


def _collect(connections: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(connections):
        waiting = [c for rank, c in enumerate(connections) if rank not in found]
        ready = wait(waiting, LIMIT)
        assert ready, f"nothing within {LIMIT} s; ranks {[r for r in range(len(connections)) if r not in found]} hang"
        for connection in ready:
            rank = connections.index(connection)
            good, value = torch.load(io.BytesIO(connection.recv_bytes()))
            assert good, f"rank {rank}:\n{value}"
            found[rank] = value
    return [found[rank] for rank in range(len(connections))]


def _enter(rank: int, world: int, folder: str, to: Connection, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        dist.barrier()  # or one that ends at once would be gone before others have found it
        _send(to, (True, function(rank, *arguments)))
    except BaseException:
        _send(to, (False, traceback.format_exc()))
    finally:
        to.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _send(to: Connection, value: Any) -> None:
    # Bytes, since torch's own way hands over files that end with the process.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    to.send_bytes(buffer.getvalue())
