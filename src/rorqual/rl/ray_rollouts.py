"""Rollout workers on Ray: actors that sample shards of the rollouts ahead, while the trainer trains.

Shard k of every rollout is the k-th of W equal parts of its problems and belongs to worker k of W. What it holds
depends on the weights' version, the seed and that part alone. A worker that dies or hangs is replaced and its shards
are sampled again, to the same tokens; each is consumed once.
"""

import contextlib
import json
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch

from rorqual.engine import SamplingParams
from rorqual.errors import UserError
from rorqual.extras import require
from rorqual.kernels.devices import gpu_count
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model import ModelConfig, Transformer
from rorqual.ray_start import cpus_of_machines, fair_threads, join_ray, reason, room
from rorqual.recipe import RLRecipe
from rorqual.rl.ray_gpus import device_here, share, trainer_device, worker_places
from rorqual.rl.rollout import Shard
from rorqual.rl.rollout_worker import RolloutWorker, WorkerSettings, shard_from
from rorqual.rl.weight_push import push_bytes, to_bytes

MAX_FAILURES = 5  # of workers in a row, without a shard in between
HANG_SECONDS = 300.0  # without a forward pass, of a worker that has started; it may wait for weights
START_SECONDS = 900.0  # of a worker: for a place in the cluster, and to import PyTorch
PULSE_SECONDS = 2.0  # between two looks at the workers that are waited for
STORE_BYTES = 128 << 20  # of Ray's object store, beside the weights


@contextlib.contextmanager
def ray_cluster(recipe: RLRecipe, config: ModelConfig, address: str) -> Generator["RayCluster"]:
    """Ray for a recipe's rollouts, on `address`: "local" starts it on this machine, "auto" joins the cluster it belongs
    to, "HOST:PORT" a given one. In a process that has joined one already, this is used.

    `recipe.rollouts` is complete (rl_run.on_ray). On leaving, Ray ends where it was started here. Raises UserError
    where Ray is missing, cannot be reached or lacks GPUs.
    """
    require("cluster")
    ray: Any = import_module("ray")
    joined = ray.is_initialized()
    try:
        if not joined:
            _join(ray, recipe, config, address)
        device, holder = trainer_device(ray, recipe)
        try:
            yield RayCluster(ray, device)
        finally:
            if holder is not None:
                ray.kill(holder)
    finally:
        if not joined:
            ray.shutdown()


@dataclass(frozen=True)
class RayCluster:
    ray: Any
    device: torch.device  # of the trainer; workers have some of the same kind

    @contextlib.contextmanager
    def fleet(self, recipe: RLRecipe, config: ModelConfig) -> Generator["RayFleet"]:
        """Workers for the recipe's rollouts, until the end of the context. Raises UserError where Ray lacks CPUs."""
        fleet = RayFleet(self.ray, recipe, config, self.device)
        try:
            yield fleet
        finally:
            fleet.close()


@dataclass
class _Worker:
    actor: Any
    refs: dict[int, Any] = field(default_factory=dict[int, Any])  # step → the shard to come
    pulse: Any = None  # a count of forward passes to come
    forwards: int | None = None  # the last count; None: it has not started yet, as far as is known
    since: float = 0.0  # when the count last changed


@dataclass
class _Task:
    """One step's rollout: what its shards are sampled from."""

    version: int
    shards: list[tuple[list[list[int]], dict[str, Any]]]  # prompts and sampling parameters
    results: dict[int, Shard] = field(default_factory=dict[int, Shard])


class RayFleet:
    """A `Fleet` (rollout_source.py) of Ray actors."""

    def __init__(self, ray: Any, recipe: RLRecipe, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        section, kind = recipe.rollouts, torch.device(device).type
        assert section.workers is not None
        assert section.staleness is not None
        self.staleness, self.pushed_bytes = section.staleness, 0
        self.notes: list[str] = []
        self._gpus = 0 if kind == "cpu" else share(recipe)  # of a worker
        room = worker_places(ray, self._gpus) if self._gpus else None
        self._ray, self._threads = ray, _threads(ray, section.workers, section.threads, room)
        self._settings = WorkerSettings(
            config=json.dumps(asdict(config)),
            dtype=dtype_name(compute_dtype(recipe.model.dtype, device)),
            precision=recipe.precision,
            weights=recipe.grpo.rollout_weights,
            exact=recipe.exact,
            record_routing=section.replay_routing,
            max_num_seqs=recipe.grpo.rollout_max_num_seqs,
            threads=self._threads,
            device=kind,
        )
        self._weights: dict[int, Any] = {}  # version → reference to Ray's copy
        self._tasks: dict[int, _Task] = {}
        self._failures = 0  # in a row
        self._workers = [_Worker(self._start()) for _ in range(section.workers)]

    def submit(
        self, step: int, version: int, model: Transformer, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        """See `Fleet`. Raises UserError when Ray's object store cannot take the weights."""
        if version not in self._weights:
            weights = to_bytes(model)  # Ray copies them
            self.pushed_bytes += sum(part.nbytes for part in weights.values())
            self._weights[version] = self._put(weights)
        # Workers have no tokenizer, which may add end tokens.
        base = {"temperature": params.temperature, "max_tokens": params.max_tokens, "n": params.n}
        base |= {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        base |= {"record_allowed": params.record_allowed}
        base |= {"stop_token_ids": params.stop_token_ids, "ignore_eos": True}
        count = len(self._workers)
        bounds = [len(prompts) * k // count for k in range(count + 1)]
        self._tasks[step] = _Task(
            version,
            [
                # The seeds of `Engine.generate` for these prompts among all of the step's.
                (prompts[first:last], base | {"seed": (params.seed or 0) + (first << 32)})
                for first, last in pairwise(bounds)
            ],
        )
        for k, worker in enumerate(self._workers):
            worker.refs[step] = self._sample(worker, k, step)

    def collect(self, step: int) -> list[Shard]:
        """See `Fleet`. Raises UserError when workers fail MAX_FAILURES times in a row, and what a worker raised."""
        task, now = self._tasks[step], time.monotonic()
        for worker in self._workers:
            worker.since = now
        while waited := {w.refs[step]: k for k, w in enumerate(self._workers) if k not in task.results}:
            ready, _ = self._ray.wait(list(waited), timeout=PULSE_SECONDS)
            for ref in ready:
                self._take(waited[ref], step)
            if not ready:
                for k in waited.values():
                    self._look_after(k)
        del self._tasks[step]
        for worker in self._workers:
            del worker.refs[step]
        needed = {task.version for task in self._tasks.values()}
        self._weights = {version: ref for version, ref in self._weights.items() if version in needed}
        return [task.results[k] for k in range(len(self._workers))]

    def close(self) -> None:
        """See `Fleet`."""
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()
        self._tasks.clear()
        self._weights.clear()

    def _put(self, weights: Any) -> Any:
        try:
            return self._ray.put(weights)
        except self._ray.exceptions.RayError as e:
            raise UserError(f"Ray cannot take the weights ({reason(e)}); see Ray's logs, then --resume") from e

    def _start(self) -> Any:
        # `pulse` calls are answered while a shard is sampled.
        needs = {"num_cpus": self._threads, "num_gpus": self._gpus}
        actor = self._ray.remote(**needs, max_restarts=0, concurrency_groups={"pulse": 1})(RolloutWorker)
        return actor.options(scheduling_strategy="SPREAD").remote(asdict(self._settings))

    def _sample(self, worker: _Worker, k: int, step: int) -> Any:
        task = self._tasks[step]
        return worker.actor.sample.remote(task.version, self._weights[task.version], *task.shards[k])

    def _take(self, k: int, step: int) -> None:
        """Keep a shard that is there, or replace the worker that failed to sample it."""
        errors = self._ray.exceptions
        try:
            arrays = self._ray.get(self._workers[k].refs[step])
        except errors.RayTaskError as e:  # raised by our own code, which would raise it again
            if isinstance(e.cause, UserError):
                raise UserError(str(e.cause)) from None
            raise
        except errors.RayError as e:
            self._replace(k, reason(e))
            return
        self._failures, worker = 0, self._workers[k]
        worker.forwards = worker.forwards or 0
        self._tasks[step].results[k] = shard_from(arrays)

    def _look_after(self, k: int) -> None:
        """Ask a worker for its count of forward passes, and replace it where that stands still."""
        worker, now = self._workers[k], time.monotonic()
        if worker.pulse is not None and self._ray.wait([worker.pulse], timeout=0)[0]:
            try:
                forwards = self._ray.get(worker.pulse)
            except self._ray.exceptions.RayError as e:
                self._replace(k, reason(e))
                return
            worker.pulse = None
            if forwards != worker.forwards:
                worker.forwards, worker.since = forwards, now
        if worker.forwards is None and now - worker.since > START_SECONDS:
            self._replace(k, f"it did not start within {START_SECONDS:g} seconds")
        elif worker.forwards is not None and now - worker.since > HANG_SECONDS:
            self._replace(k, f"it computed nothing for {HANG_SECONDS:g} seconds")
        elif worker.pulse is None:
            worker.pulse = worker.actor.forwards.options(concurrency_group="pulse").remote()

    def _replace(self, k: int, why: str) -> None:
        """Start another worker, and have it sample the shards that this one owes."""
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"rollout workers failed {self._failures} times in a row, the last: {why}; see Ray's logs and the "
                "machines' memory, then continue with --resume"
            )
        self.notes.append(f"rollout worker {k + 1} is replaced: {why}")
        old = self._workers[k]
        self._kill(old)
        self._workers[k] = worker = _Worker(self._start(), since=time.monotonic())
        for step in sorted(old.refs):
            done = k in self._tasks[step].results
            worker.refs[step] = old.refs[step] if done else self._sample(worker, k, step)

    def _kill(self, worker: _Worker) -> None:
        with contextlib.suppress(Exception):  # it may be dead, or Ray gone
            self._ray.kill(worker.actor, no_restart=True)


def _join(ray: Any, recipe: RLRecipe, config: ModelConfig, address: str) -> None:
    section, device = recipe.rollouts, device_here(recipe, address)
    workers, staleness = section.workers or 1, section.staleness or 0
    version = push_bytes(config, compute_dtype(recipe.model.dtype, device), recipe.grpo.rollout_weights)
    cpus = workers * (section.threads or max(1, torch.get_num_threads() // workers))
    store = STORE_BYTES + (staleness + 2) * version
    gpus = 0 if device.type == "cpu" else gpu_count()
    join_ray(ray, address, "--ray", {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": store})


def _threads(ray: Any, workers: int, threads: int | None, most: Sequence[int] | None) -> int:
    """Threads of a worker: as given, else a fair share. Raises UserError where there is no room.

    most: workers of each machine, for want of GPUs.
    """
    machines = cpus_of_machines(ray)
    chosen = threads or fair_threads(machines, workers, most)
    if (found := room(machines, chosen, most)) < workers:
        raise UserError(
            f"rollouts.workers = {workers}: Ray's machines have {', '.join(map(str, machines))} CPUs, room for {found} "
            f"workers with rollouts.threads = {chosen}; lower one of the two"
        )
    return chosen
