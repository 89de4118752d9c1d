"""Which rank does what: pipeline stages, experts, data and context, from a recipe's sizes (V3 §3.2, §4.2).

    rank = stage · (data · context) + place, or place · pipeline + stage with `stages_together`

The ranks of a stage hold the same layers. Each place has its own tokens: `data` ranks have sequences of their own,
`context` ranks share a sequence and have a part of it each. Experts are spread over `experts` places, next to each
other, so a layer's routed experts exist data · context / experts times; everything else is on every place.
"""

import os
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from rorqual.errors import Stopped, UserError
from rorqual.parallel.group import CommunicationError, Group, Traffic
from rorqual.parallel.watchdog import PYTORCH, Watchdog
from rorqual.sections import ParallelSection

JOIN = timedelta(minutes=20)  # for all processes to start


@dataclass(frozen=True)
class Mesh:
    """This process's place and its groups."""

    section: ParallelSection
    rank: int
    device_mesh: DeviceMesh | None  # None: one process, or a plan
    traffic: Traffic
    pipeline: Group  # the same place of every stage, in order of stages
    tokens: Group  # of this stage: those with which gradients of all but routed experts are summed
    experts: Group  # which together hold the routed experts of this stage's layers
    replicas: Group  # with the same routed experts
    context: Group  # with the same sequences
    data: Group  # with the same part of other sequences
    rail: Group  # of `experts`: the same place in every node
    node: Group  # of `experts`: in this node

    @property
    def world(self) -> Group:
        size = self.section.processes
        return Group(
            dist.group.WORLD if size > 1 else None, tuple(range(size)), self.rank, self.tokens.ranks_per_node,
            self.traffic, self.tokens.watchdog,
        )  # fmt: skip


def check_layout(section: ParallelSection, ranks_per_node: int) -> None:
    """Raises UserError for sizes that do not fit each other, with what to change."""
    places = section.data * section.context
    if places % section.experts:
        raise UserError(
            f"parallel.experts = {section.experts}: experts are spread over the data · context = {places} ranks of a "
            f"stage; make it one of {', '.join(str(n) for n in range(1, places + 1) if places % n == 0)}"
        )
    inside = experts_per_node(section, ranks_per_node)
    if section.experts % inside and inside % section.experts:
        raise UserError(
            f"parallel.experts = {section.experts} with {inside} ranks of a stage on each node: neither divides the "
            "other, so nodes would hold unequal parts of the experts; change parallel.experts or "
            "parallel.ranks_per_node"
        )


def experts_per_node(section: ParallelSection, ranks_per_node: int) -> int:
    """Neighbouring places of a stage that are on one node. Raises UserError where nodes would cut stages unevenly."""
    if not section.stages_together:
        return ranks_per_node
    if ranks_per_node % section.pipeline and section.pipeline % ranks_per_node:
        raise UserError(
            f"parallel.stages_together with pipeline = {section.pipeline} and {ranks_per_node} ranks a node: neither "
            "divides the other; change parallel.pipeline or parallel.ranks_per_node"
        )
    return max(1, ranks_per_node // section.pipeline)


def single(section: ParallelSection | None = None) -> Mesh:
    """The mesh of one process, which communicates with nobody."""
    section, traffic = section or ParallelSection(), Traffic()
    alone = Group(None, (0,), 0, 1, traffic)
    return Mesh(section, 0, None, traffic, *[alone] * 8)


def ranks_per_node(section: ParallelSection) -> int:
    """Of the recipe, or those of this machine."""
    return section.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", section.processes))


def ranks_of_groups(section: ParallelSection, rank: int, per_node: int) -> dict[str, tuple[int, ...]]:
    """The ranks of each group that a rank is in, by the names of `Mesh`. Raises UserError for sizes that do not fit."""
    check_layout(section, per_node)
    places, experts, context = section.data * section.context, section.experts, section.context
    node = experts // max(1, experts // experts_per_node(section, per_node))  # of `experts`, in each node
    if section.stages_together:
        place, stage = divmod(rank, section.pipeline)
    else:
        stage, place = divmod(rank, places)

    def at(stage: int, place: int) -> int:
        return place * section.pipeline + stage if section.stages_together else stage * places + place

    first, inside = place // experts * experts, place % node  # the first place with the same experts; in its node
    found = {
        "tokens": range(places),
        "experts": range(first, first + experts),
        "replicas": range(place % experts, places, experts),
        "context": range(place // context * context, place // context * context + context),
        "data": range(place % context, places, context),
        "rail": range(first + inside, first + experts, node),
        "node": range(place - inside, place - inside + node),
    }
    every = {name: tuple(at(stage, other) for other in others) for name, others in found.items()}
    return every | {"pipeline": tuple(at(other, place) for other in range(section.pipeline))}


def planned_mesh(section: ParallelSection, rank: int) -> Mesh:
    """The mesh that `build_mesh` makes in a rank, without its processes: to compute with, not to communicate.

    Raises UserError for sizes that do not fit.
    """
    per_node, traffic = ranks_per_node(section), Traffic()
    groups = {
        name: Group(None, ranks, ranks.index(rank), per_node, traffic)
        for name, ranks in ranks_of_groups(section, rank, per_node).items()
    }
    return Mesh(section, rank, None, traffic, **groups)


def build_mesh(section: ParallelSection, device: str = "cpu") -> Mesh:
    """Join the run's processes (torchrun's variables, or `init_process_group` called before) and make the groups.

    Raises UserError when the number of processes is not that of the recipe, for sizes that do not fit, and where they
    do not come together.
    """
    if section.processes == 1:
        return single(section)
    timeout, store = timedelta(seconds=section.timeout), None
    if not dist.is_initialized():
        store = _join("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != section.processes:
        raise UserError(
            f"parallel: pipeline · data · context = {section.processes} processes, and {world} were started; start "
            f"{section.processes}, or change the sizes"
        )
    per_node = ranks_per_node(section)
    ranks_of = ranks_of_groups(section, rank, per_node)
    places, experts, nodes = section.data * section.context, section.experts, len(ranks_of["rail"])
    order = {"pipeline": section.pipeline, "tokens": places}
    names = tuple(reversed(order)) if section.stages_together else tuple(order)
    with _joining():
        stages = init_device_mesh(device, tuple(order[name] for name in names), mesh_dim_names=names)
        by_context = _split(stages, "tokens", (section.data, section.context), ("data", "context"))
        by_experts = _split(stages, "tokens", (places // experts, experts), ("replicas", "experts"))
        by_node = _split(by_experts, "experts", (nodes, experts // nodes), ("rail", "node"))
    traffic, watchdog = Traffic(), Watchdog(rank, timeout, store)
    watchdog.start()
    if (everyone := dist.group.WORLD) is not None:
        _set_timeout(everyone, timeout, device)

    def group(mesh: DeviceMesh, name: str) -> Group:
        ranks = ranks_of[name]
        process_group = mesh.get_group(name) if len(ranks) > 1 else None
        if process_group is not None:  # a mesh gives its groups torch's time-out, which is half an hour
            _set_timeout(process_group, timeout, device)
        return Group(process_group, ranks, ranks.index(rank), per_node, traffic, watchdog)

    return Mesh(
        section, rank, stages, traffic,
        pipeline=group(stages, "pipeline"), tokens=group(stages, "tokens"), experts=group(by_experts, "experts"),
        replicas=group(by_experts, "replicas"), context=group(by_context, "context"), data=group(by_context, "data"),
        rail=group(by_node, "rail"), node=group(by_node, "node"),
    )  # fmt: skip


@contextmanager
def joined(section: ParallelSection, device: str = "cpu") -> Generator[Mesh]:
    """`build_mesh`, whose processes part at the end, where it is they who have joined.

    After an error they do not: one that waits for the others could wait for ever.
    """
    here_before = dist.is_initialized()
    mesh, ended = build_mesh(section, device), False
    try:
        yield mesh
        ended = True
    except Stopped:  # all of them, after the same step
        ended = True
        raise
    finally:
        if ended and dist.is_initialized() and not here_before:
            dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> Store:
    """Wait until all processes have come, which may take longer than any collective, and make the world's group.

    → the store that they share, on a connection of its own.
    """
    with _joining():
        store, rank, world = next(iter(rendezvous("env://", timeout=JOIN)))
        store = PrefixStore(meet(store, rank, world), store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
        return store.clone()  # pyright: ignore[reportAttributeAccessIssue] -- which torch's stubs lack


@contextmanager
def _joining() -> Iterator[None]:
    """Raises CommunicationError where the processes do not come together."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise CommunicationError(
            f"rank {os.environ.get('RANK', '?')} could not join the others ({str(e).splitlines()[0][:200]}); one of "
            "them has ended, or cannot be reached: its own output says why"
        ) from e


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta, device: str) -> None:
    """Of gloo, whose calls raise; that of NCCL, whose watchdog ends the process in words of its own, is after ours."""
    _set_pg_timeout(timeout, group)
    if device == "cuda":
        backend = group._get_backend(torch.device("cuda"))  # pyright: ignore[reportPrivateUsage]
        backend._set_default_timeout(timeout + timedelta(seconds=PYTORCH))  # pyright: ignore[reportPrivateUsage]


def meet(store: Store, rank: int, world: int) -> str:
    """Wait for all ranks to call this → a name that they have in common, and that no earlier attempt had.

    torchrun's store outlives its processes: after a restart it still holds the addresses of those that have ended.
    Whoever answers rank 0's newest call is let in by the number that it chose itself, which nobody had before.
    """
    number = uuid.uuid4().hex
    if rank == 0:
        store.set("call", number)
        keys = {other: f"{number}/{other}" for other in range(1, world)}
        try:
            come = [store.get(key).decode() for key in keys.values()]
        except RuntimeError as e:
            away = [str(other) for other, key in keys.items() if not store.check([key])]
            raise RuntimeError(f"rank {', '.join(away)} of {world} did not come within {JOIN}") from e
        for theirs in come:
            store.set(f"{number}/{theirs}", "")
        return number
    end = time.monotonic() + JOIN.total_seconds()
    while time.monotonic() < end:
        call = store.get("call").decode()
        store.set(f"{call}/{rank}", number)
        try:
            store.wait([f"{call}/{number}"], timedelta(seconds=1))
        except RuntimeError:
            continue  # not all are there, or the call was an earlier attempt's
        return call
    raise RuntimeError(f"not all of {world} processes came within {JOIN}")


def _split(mesh: DeviceMesh, name: str, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """The mesh with one dimension cut into several."""
    return mesh._unflatten(name, tuple(sizes), tuple(names))  # pyright: ignore[reportPrivateUsage] -- not public yet
