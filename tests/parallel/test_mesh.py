import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch.distributed as dist

from helpers.processes import run
from rorqual.errors import Stopped, UserError
from rorqual.parallel import mesh
from rorqual.parallel.mesh import build_mesh, check_layout, joined, meet, planned_mesh, single
from rorqual.sections import ParallelSection

NAMES = ("pipeline", "tokens", "experts", "replicas", "context", "data", "rail", "node")


def groups(rank, layout):
    section = ParallelSection(**layout)
    mesh, planned = build_mesh(section), planned_mesh(section, rank)
    for name in NAMES:
        group, other = getattr(mesh, name), getattr(planned, name)
        assert (group.ranks, group.place, group.ranks_per_node) == (other.ranks, other.place, other.ranks_per_node)
        if group.size > 1:
            assert tuple(dist.get_process_group_ranks(group.process_group)) == group.ranks
    return {name: getattr(mesh, name).ranks for name in NAMES}


def test_neighbours_share_experts():
    found = run(8, groups, {"pipeline": 2, "data": 4, "experts": 2, "ranks_per_node": 2})
    assert found[5] == {
        "pipeline": (1, 5), "tokens": (4, 5, 6, 7), "experts": (4, 5), "replicas": (5, 7), "context": (5,),
        "data": (4, 5, 6, 7), "rail": (5,), "node": (4, 5),
    }  # fmt: skip


def test_stages_together_spread_experts_over_nodes():
    found = run(8, groups, {"pipeline": 2, "data": 4, "experts": 4, "ranks_per_node": 4, "stages_together": True})
    assert found[5] == {
        "pipeline": (4, 5), "tokens": (1, 3, 5, 7), "experts": (1, 3, 5, 7), "replicas": (5,), "context": (5,),
        "data": (1, 3, 5, 7), "rail": (1, 5), "node": (5, 7),
    }  # fmt: skip


def test_v3s_layout_without_its_2048_processes():
    """Stages of 128 neighbouring ranks; experts over 8 nodes, twice in a stage."""
    mesh = planned_mesh(ParallelSection(pipeline=16, data=128, experts=64, ranks_per_node=8), 128 + 72)
    assert mesh.pipeline.ranks == tuple(range(72, 2048, 128))
    assert mesh.tokens.ranks == mesh.data.ranks == tuple(range(128, 256))
    assert mesh.experts.ranks == tuple(range(192, 256))
    assert mesh.replicas.ranks == (136, 200)
    assert mesh.node.ranks == tuple(range(200, 208))
    assert mesh.rail.ranks == tuple(range(192, 256, 8))
    assert mesh.rail.link(0) == "between nodes"
    assert mesh.node.link(7) == "within a node"


@pytest.mark.parametrize(
    ("layout", "per_node", "said"),
    [
        ({"data": 4, "experts": 3}, 4, "parallel.experts = 3: .* make it one of 1, 2, 4"),
        ({"data": 12, "experts": 6}, 4, "parallel.experts = 6 with 4 ranks of a stage"),
        ({"pipeline": 3, "data": 4, "stages_together": True}, 4, "pipeline = 3 and 4 ranks a node"),
    ],
)
def test_layouts_that_do_not_fit(layout, per_node, said):
    with pytest.raises(UserError, match=said):
        check_layout(ParallelSection(**layout), per_node)


def start(rank):
    with pytest.raises(UserError, match="= 4 processes, and 2 were started"):
        build_mesh(ParallelSection(data=4))


def test_the_number_of_processes_is_checked():
    run(2, start)


def test_a_restart_does_not_meet_those_who_have_ended():
    """The store is the same; rank 0 comes first, last and between."""
    store, names = dist.HashStore(), []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        with ThreadPoolExecutor(3) as pool:
            waiting = []
            for rank in order:
                waiting.append(pool.submit(meet, store, rank, 3))
                time.sleep(0.05)
            found = {future.result(30) for future in waiting}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3


def test_ranks_that_do_not_come_are_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.5))
    store.set("call", "of an earlier attempt")
    with pytest.raises(RuntimeError, match="rank 1, 2 of 3 did not come within 0:20:00"):
        meet(store, 0, 3)


class Parted:
    """torch.distributed, as far as joining and parting go."""

    def __init__(self, initialized):
        self.initialized = initialized

    def is_initialized(self):
        return self.initialized

    def destroy_process_group(self):
        self.initialized = False


@pytest.mark.parametrize(
    ("before", "error", "after"),
    [(False, None, False), (False, Stopped, False), (False, UserError, True), (True, None, True)],
)
def test_those_who_joined_part_unless_one_failed(monkeypatch, before, error, after):
    state = Parted(before)

    def join(section, device):
        state.initialized = True
        return single(section)

    monkeypatch.setattr(mesh, "dist", state)
    monkeypatch.setattr(mesh, "build_mesh", join)
    raised = nullcontext() if error is None else pytest.raises(error)
    with raised, joined(ParallelSection()):
        assert state.initialized
        if error is not None:
            raise Stopped(15, "a signal") if error is Stopped else UserError("a reason")
    assert state.initialized == after
