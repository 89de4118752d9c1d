"""Placement of experts: whole, consistent, within nodes, and at least as even as EPLB's."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import shape_checks
from rorqual.errors import UserError
from rorqual.parallel.balance import balance_of, rebalance_experts


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("expert_balance")  # its greedy packing is independent of ours


def gpu_loads(load, slots, gpus):
    """Of one layer, counted slot by slot."""
    copies, per_gpu = Counter(slots), len(slots) // gpus
    return [sum(load[e] / copies[e] for e in slots[g * per_gpu : (g + 1) * per_gpu]) for g in range(gpus)]


def balance(load, slots, gpus):
    loads = gpu_loads(load, slots, gpus)
    return max(loads) * gpus / sum(loads)


@st.composite
def cases(draw):
    """Loads and sizes of both policies; many loads are zero or equal."""
    nodes, per_node, groups, per_group = (draw(st.integers(1, most)) for most in (4, 5, 6, 4))
    experts, gpus = groups * per_group, nodes * per_node
    per_gpu = -(-experts // gpus) + draw(st.integers(0, 3))
    one = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6))
    layers = draw(st.lists(st.lists(one, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return torch.tensor(layers), gpus * per_gpu, groups, nodes, gpus


@settings(deadline=None, max_examples=200)
@given(cases())
def test_a_placement_is_whole_and_consistent(case):
    load, replicas, groups, nodes, _ = case
    experts = load.shape[1]
    slots, slots_of, copies = (t.tolist() for t in rebalance_experts(*case))
    assert max(map(max, copies)) == len(slots_of[0][0])
    for layer in range(len(load)):
        assert len(slots[layer]) == replicas
        assert [Counter(slots[layer])[e] for e in range(experts)] == copies[layer]
        assert min(copies[layer]) >= 1
        for e in range(experts):
            where = [s for s, expert in enumerate(slots[layer]) if expert == e]
            assert slots_of[layer][e] == where + [-1] * (len(slots_of[layer][e]) - len(where))
        if groups % nodes == 0:
            homes = {(e // (experts // groups), s // (replicas // nodes)) for s, e in enumerate(slots[layer])}
            assert len(homes) == groups


@settings(deadline=None, max_examples=50)
@given(cases())
def test_balance_is_the_busiest_gpu_over_the_mean(case):
    load, gpus = case[0], case[-1]
    placed = rebalance_experts(*case)
    found = balance_of(load, placed.physical_to_logical, placed.copies, gpus).tolist()
    for row, slots, value in zip(load.tolist(), placed.physical_to_logical.tolist(), found, strict=True):
        assert value == pytest.approx(balance(row, slots, gpus) if sum(row) else 1)


def test_as_even_as_the_published_example():
    """EPLB's README: two layers of 12 experts in 4 groups, 16 replicas, 2 nodes of 4 GPUs."""
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    placed = rebalance_experts(torch.tensor(load), 16, 4, 2, 8).physical_to_logical.tolist()
    for row, ours, theirs in zip(load, placed, published, strict=True):
        assert balance(row, ours, 8) <= balance(row, theirs, 8) + 1e-9


@pytest.mark.parametrize(
    "sizes",  # experts, replicas, groups, nodes, GPUs
    [(256, 288, 8, 4, 32), (256, 288, 8, 18, 144), (64, 80, 1, 1, 8), (96, 120, 12, 3, 15), (32, 48, 16, 2, 4)],
)
def test_never_worse_than_the_published_greedy(published, sizes):
    """200 layers a shape: loads of lognormal and Pareto tails, up to one expert with most of the load."""
    experts, *shape = sizes
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(100, experts, generator=random, dtype=torch.float64)
    uniform = 1 - torch.rand(100, experts, generator=random, dtype=torch.float64)
    tails = torch.linspace(0.2, 2, 100)[:, None]
    load = torch.cat([(tails * normal).exp(), uniform ** -(tails / 2)])
    placed = rebalance_experts(load, *shape)
    ours = [balance(*row, shape[-1]) for row in zip(load.tolist(), placed.physical_to_logical.tolist(), strict=True)]
    theirs = [published.published_greedy(row, published.Shape(*shape)) for row in load.tolist()]
    assert all(a <= b + 1e-9 for a, b in zip(ours, theirs, strict=True))


def test_exchanges_even_out_what_greedy_packing_cannot():
    """Greedily 3+2+2 and 3+2+0; exchanging a 3 for a 2 makes them even."""
    load = torch.tensor([[3, 3, 2, 2, 2, 0]])
    placed = rebalance_experts(load, 6, 1, 1, 2)
    assert balance_of(load, placed.physical_to_logical, placed.copies, 2).tolist() == [1]


def test_copies_nobody_needs_are_spread():
    idle = rebalance_experts(torch.zeros(1, 8), 16, 1, 1, 4)
    assert idle.copies.tolist() == [[2] * 8]
    one_busy = rebalance_experts(torch.tensor([[6, 0, 0, 0]]), 8, 2, 2, 4)
    assert one_busy.copies.tolist() == [[3, 1, 2, 2]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replicas": 7}, "replicas = 7 leaves some of the 8 experts out"),
        ({"replicas": 10}, "gpus = 4 does not divide the number of replicas, 10"),
        ({"nodes": 3}, "nodes = 3 does not divide the number of GPUs, 4"),
        ({"nodes": 0}, "nodes = 0 does not"),
        ({"groups": 3}, "groups = 3 does not divide the number of experts, 8"),
        ({"load": torch.full((1, 8), -1.0)}, "negative or non-finite"),
        ({"load": torch.full((1, 8), torch.nan)}, "negative or non-finite"),
        ({"load": torch.full((1, 8), torch.inf)}, "negative or non-finite"),
        ({"load": torch.ones(8)}, r"load has shape \[8\]"),
        ({"load": torch.ones(0, 8)}, r"load has shape \[0, 8\]"),
    ],
)
def test_what_cannot_be_placed_is_one_sentence(change, said):
    sizes = {"load": torch.ones(1, 8), "replicas": 12, "groups": 4, "nodes": 2, "gpus": 4} | change
    with shape_checks.off(), pytest.raises(UserError, match=said):
        rebalance_experts(**sizes)


def test_balance_of_uneven_gpus_is_refused():
    with pytest.raises(UserError, match="gpus = 3 does not divide"):
        balance_of(torch.ones(1, 4), torch.arange(4)[None], torch.ones(1, 4, dtype=torch.int64), 3)
