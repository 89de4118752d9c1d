"""Several engines behind one address, as replicas of a Ray Serve deployment.

Ray Serve starts them, checks their health and replaces those that end. The front (serve/front.py) is a process of its
own with the listening socket; it passes each request, as an ASGI scope and body, to the replica that the router
chooses, and the replica answers with the whole application (serve/app.py).
"""

# pyright: reportMissingImports=none
# Ray, of the extra `cluster`, is imported by those alone who start replicas.

import asyncio
import contextlib
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import Message, Scope

from rorqual.cores import threads_asked_for
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.prefix_router import PrefixRouter
from rorqual.errors import UserError
from rorqual.ray_start import LOCAL, cpus_of_machines, fair_threads, join_ray, room
from rorqual.serve.app import build_app
from rorqual.serve.service import ModelService, Options

NAMESPACE = "rorqual"
HEALTH_SECONDS = 2.0  # between two checks; a replica whose process ends is noticed at once
NAME_HEADER = b"x-replica"
NO_LIMIT = 1_000_000  # the engine itself limits the requests of a replica (429)


class PrefixAwareRequestRouter(RequestRouter):
    """Sends a request to the replica that has its prefix, unless that is too busy (engine/prefix_router.py).

    Replicas' requests are counted here, since there is one front: Serve's own counts are old while nothing changes.
    """

    def initialize_state(self, **_: Any) -> None:
        self.prefixes: PrefixRouter[ReplicaID] = PrefixRouter()
        self.running: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The argument `number` of a request, where it is not None, asks for a replica by its place in order."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        by_id = {one.replica_id: one for one in candidate_replicas}
        number = pending_request.kwargs["number"]
        if number is not None:
            order = sorted(by_id, key=str)
            return [[by_id[order[number % len(order)]]]]
        loads = {one: self.running[one] for one in by_id}
        first = by_id.pop(self.prefixes.choose(pending_request.kwargs["prefix"], loads))
        return [[first], list(by_id.values())]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self.running[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.running[replica_id] = max(0, self.running[replica_id] - 1)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.prefixes.forget(replica_id)
        del self.running[replica_id]


class Replica:
    """One engine with the whole application."""

    def __init__(self, model: str, arguments: dict[str, Any], sampling: SamplingParams, options: Options) -> None:
        """arguments: Engine's."""
        self.service = ModelService(Engine(model, **arguments), sampling, options)
        self.service.engine.prepare()
        self.app = build_app(self.service)
        self.service.engine_thread.start()
        self.name = serve.get_replica_context().replica_id.unique_id

    async def answer(
        self, scope: Scope, body: bytes, prefix: Sequence[bytes], number: int | None
    ) -> AsyncIterator[list[Message]]:
        """The application's answer, messages that are ready together in one list. prefix, number: for the router."""
        ready: asyncio.Queue[Message | None] = asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return unread.pop() if unread else await asyncio.Future[Message]()  # a client that leaves cancels us

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (NAME_HEADER, self.name.encode())]
            await ready.put(message)

        async def run() -> None:
            try:
                await self.app(scope, receive, send)
            finally:
                ready.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            ended = False
            while not ended:
                messages = [await ready.get()]
                while not ready.empty():
                    messages.append(ready.get_nowait())
                ended = messages[-1] is None
                if found := [m for m in messages if m is not None]:
                    yield found
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose check raises."""
        if not self.service.engine_thread.alive:
            raise RuntimeError("the engine has stopped")


@contextlib.contextmanager
def replicas(
    model: Path, count: int, arguments: dict[str, Any], sampling: SamplingParams, options: Options,
    router: type[RequestRouter] = PrefixAwareRequestRouter,
) -> Iterator[Any]:  # fmt: skip
    """Start `count` replicas, on this machine or, with RAY_ADDRESS, on a cluster → a handle of their deployment. They
    end with the context, and nothing else of a cluster does. Raises UserError where they don't start.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL  # or Ray would join whatever `ray start` has started here
    name = f"{NAMESPACE}-{uuid.uuid4().hex[:8]}"  # two fronts may share a cluster
    join_ray(ray, address, "--replicas with RAY_ADDRESS =", namespace=NAMESPACE, configure_logging=False)
    try:
        machines = cpus_of_machines(ray)
        threads = fair_threads(machines, count)
        # Ray's own default is one thread. Cores are counted where there are enough, so that replicas spread.
        environment = {"OMP_NUM_THREADS": threads_asked_for() or str(threads)}
        gpu = str(arguments.get("device", "cpu")).startswith("cuda")
        cpus = threads if address != LOCAL and room(machines, threads) >= count else 0
        actor = {"num_cpus": cpus, "num_gpus": int(gpu), "runtime_env": {"env_vars": environment}}
        serve.start(proxy_location="Disabled")
        routing: dict[str, Any] = {"request_router_class": router}  # Ray's own annotation of it is a dictionary
        deployment = serve.deployment(
            num_replicas=count, max_ongoing_requests=NO_LIMIT, ray_actor_options=actor,
            request_router_config=RequestRouterConfig(**routing),
            health_check_period_s=HEALTH_SECONDS, graceful_shutdown_timeout_s=HEALTH_SECONDS,
        )(Replica)  # fmt: skip
        inside = replace(options, host="127.0.0.1", keys=())  # of the front alone
        bound = deployment.bind(str(model.resolve()), arguments, sampling, inside)
        try:
            handle = serve.run(bound, name=name, route_prefix=None)
        except RuntimeError as e:
            raise UserError(f"the replicas did not start: {str(e).strip().splitlines()[-1]}") from e
        yield handle
    finally:
        serve.delete(name) if address != LOCAL else serve.shutdown()
        ray.shutdown()
