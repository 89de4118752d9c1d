"""An engine on several processes of this machine, which share the model's routed experts and step together."""

import atexit
import multiprocessing
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rorqual.engine.block_manager import BlockManager
from rorqual.engine.engine import DEFAULT_KV_CACHE_BYTES, Engine
from rorqual.engine.lockstep import Follower, FrontScheduler
from rorqual.engine.paged_kv_cache import PagedKVCache
from rorqual.engine.scheduler import Scheduler
from rorqual.errors import UserError
from rorqual.model import ModelConfig
from rorqual.model.model_directory import is_gguf
from rorqual.parallel.courier import Courier
from rorqual.parallel.expert_placement import ExpertPlacement, check_slots
from rorqual.parallel.mesh import build_mesh
from rorqual.sections import ParallelSection

# Its server imports torch once; each process is then a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
MODULE = "rorqual.engine.expert_parallel"
READY = "ready"
REBALANCE_SECONDS = 600.0  # as V3's deployment (§3.4.1)
END_SECONDS = 10.0


class ExpertParallelEngine(Engine):
    """The engine of rank 0, which starts the others. Sequences and KV cache of each process are its own, so there are
    `experts` times `max_num_seqs` and `kv_cache_bytes`; each keeps a part of every layer's routed experts, the rest of
    the model as a whole.

    After an error of one process nothing goes on, since they step together: `reset` starts them all again. Close the
    engine in the end.
    """

    def __init__(
        self, model: str | Path, experts: int, redundant_experts: int = 0,
        rebalance_seconds: float | None = REBALANCE_SECONDS, **options: Any,
    ) -> None:  # fmt: skip
        """model: a directory. experts: processes; with device "cuda" each has a GPU. redundant_experts: copies of busy
        experts a layer, beyond one of each. rebalance_seconds: between two placements of the experts by their loads;
        None: never. options: Engine's, for each process.

        Raises UserError for invalid arguments, and what Engine raises.
        """
        self._arguments = model, experts, redundant_experts, rebalance_seconds, options
        self.experts, self.redundant, self.seconds = experts, redundant_experts, rebalance_seconds
        self._processes: list[BaseProcess] = []
        self._ranks: list[Connection] = []
        options = _checked(model, experts, redundant_experts, options)
        self._folder = tempfile.TemporaryDirectory(prefix="rorqual-")
        atexit.register(self.close)
        try:
            self._all_threads = torch.get_num_threads()
            self._start(str(model), options)
            super().__init__(model, **_on_rank(0, experts, options))
            for rank, connection in enumerate(self._ranks, 1):
                if (said := _receive(rank, connection)) != READY:
                    raise UserError(f"rank {rank}: {said}")
            for connection in self._ranks:
                connection.send(READY)
            self.placement = _join(self, 0, experts, redundant_experts, self._folder.name)
            self.prepare()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        return self.experts * self.max_num_seqs

    def rebalance(self) -> None:
        """Place the experts by the loads measured since the last time, before the next step."""
        self._front.rebalance_due = True

    def reset(self) -> None:
        """Start all processes again. Raises as the constructor does."""
        super().reset()
        self.close()
        model, experts, redundant, seconds, options = self._arguments
        self.__init__(model, experts, redundant, seconds, **options)

    def close(self) -> None:
        """End the other processes."""
        atexit.unregister(self.close)
        for connection in self._ranks:
            connection.close()
        end = time.monotonic() + END_SECONDS
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        if self._processes and dist.is_initialized():
            dist.destroy_process_group()
        self._ranks, self._processes = [], []
        torch.set_num_threads(self._all_threads)
        self._folder.cleanup()

    @property
    def _front(self) -> FrontScheduler:
        assert isinstance(self._scheduler, FrontScheduler)
        return self._scheduler

    def _new_scheduler(self, cache: PagedKVCache, blocks: BlockManager) -> Scheduler:
        front = FrontScheduler(self.model, self.max_num_seqs, cache, blocks, self.max_prefill_tokens, self.speculative)
        return front.join(self.placement, self._ranks, self.seconds)

    def _start(self, model: str, options: dict[str, Any]) -> None:
        CONTEXT.set_forkserver_preload([MODULE])
        for rank in range(1, self.experts):
            ours, theirs = CONTEXT.Pipe()
            arguments = rank, self.experts, self.redundant, self._folder.name, model, options, theirs
            process = CONTEXT.Process(target=_follow, args=arguments, name=f"experts {rank}", daemon=True)
            process.start()
            theirs.close()
            assert isinstance(ours, Connection)
            self._ranks.append(ours)
            self._processes.append(process)


def _checked(model: str | Path, experts: int, redundant: int, options: dict[str, Any]) -> dict[str, Any]:
    if experts < 2:
        raise UserError(f"experts = {experts}: give 2 processes or more, or leave it out")
    if is_gguf(model):
        raise UserError(f"experts = {experts}: a .gguf file has no routed experts that processes could share")
    check_slots(ModelConfig.load(model), experts, redundant)
    if options.get("speculative") == "mtp":
        raise UserError('speculative = "mtp": drafts of the multi-token module are for one process; use "ngram"')
    if torch.device(options.get("device", "cpu")).type == "cuda" and torch.cuda.device_count() < experts:
        found = torch.cuda.device_count()
        raise UserError(f"experts = {experts} on cuda: each process needs a GPU, and there are {found}; lower it")
    if dist.is_initialized():
        raise UserError("experts: this process is in a process group already; start the engine in one of its own")
    speculative = options.get("speculative")
    return options | {
        "kv_cache_bytes": options.get("kv_cache_bytes") or DEFAULT_KV_CACHE_BYTES,
        "speculative": None if speculative == "auto" else speculative,
    }


def _on_rank(rank: int, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """A rank's device, or its share of the processor's cores."""
    if torch.device(options.get("device", "cpu")).type == "cuda":
        torch.cuda.set_device(rank)
        return options | {"device": f"cuda:{rank}"}
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    return options


def _join(engine: Engine, rank: int, ranks: int, redundant: int, folder: str) -> ExpertPlacement:
    """Join the process group, and give up the experts of the other ranks."""
    device = engine.model.model.norm.weight.device.type
    store = dist.FileStore(str(Path(folder) / "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    section = ParallelSection(data=ranks, experts=ranks, ranks_per_node=ranks)
    return ExpertPlacement(engine.model, build_mesh(section, device), Courier(), redundant)


def _receive(rank: int, connection: Connection) -> object:
    try:
        return connection.recv()
    except EOFError:
        raise UserError(f"rank {rank} ended while it loaded the model; its own output says why") from None


def _follow(
    rank: int, ranks: int, redundant: int, folder: str, model: str, options: dict[str, Any], front: Connection
) -> None:
    """A rank but the first: load, join, and follow until the front ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front, which gets them too, decides
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = Engine(model, **_on_rank(rank, ranks, options))
    except UserError as e:
        front.send(str(e))
        return
    front.send(READY)
    try:
        front.recv()  # all are ready
    except EOFError:
        return
    placement = _join(engine, rank, ranks, redundant, folder)
    engine.prepare()
    Follower(engine, placement, front).run()
    dist.destroy_process_group()
