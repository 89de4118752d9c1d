"""Where routed experts live: busy experts get copies, and GPUs get the same load (EPLB; V3 §3.4, redundant experts).

Everything happens in NumPy on the CPU, for all layers at once: L layers (or L layers × nodes: rows, R), E experts.
A physical expert is a slot of a GPU; slots are numbered GPU by GPU, GPUs node by node.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.shapes import Float, Int, Int64

EXCHANGES = 8  # with 32 the balance of V3's sizes is less than 0.1 % lower


class Placement(NamedTuple):
    physical_to_logical: Int64[Tensor, "L replicas"]  # the expert in each slot
    logical_to_physical: Int64[Tensor, "L E most"]  # the slots of each expert, ascending; then -1
    copies: Int64[Tensor, "L E"]


def rebalance_experts(
    load: Float[Tensor, "L E"] | Int[Tensor, "L E"], replicas: int, groups: int, nodes: int, gpus: int
) -> Placement:
    """Places `replicas` physical experts a layer, `replicas / gpus` on each GPU and every expert at least once.

    load: tokens (or any measure) of each expert. Where `nodes` divides `groups`, each group of experts stays on one
    node (hierarchical, for group-limited routing); otherwise groups and nodes are ignored (global). Two copies of an
    expert may meet on a GPU. Source: EPLB's README; exchanges after its greedy packing are ours, and never make GPUs
    less even.
    Raises UserError for sizes that do not divide each other, too few replicas, and negative or non-finite loads.
    """
    _check(load, replicas, groups, nodes, gpus)
    if groups % nodes:
        groups = nodes = 1
    layers, experts = load.shape
    loads = load.detach().cpu().double().numpy()
    mean = loads.mean(1, keepdims=True)
    loads = np.maximum(loads, np.where(mean > 0, 1e-9 * mean, 1.0))  # or copies that nobody needs gather in one expert

    # Without exchanges: more even nodes now and then end in less even GPUs.
    packed = _pack(loads.reshape(layers, groups, -1).sum(2), nodes)
    of_group = np.arange(experts).reshape(groups, -1)
    members = of_group[packed].reshape(layers * nodes, -1)  # the experts of each node
    node_loads = np.take_along_axis(loads, members.reshape(layers, -1), 1).reshape(members.shape)
    counts = _copies(node_loads, replicas // nodes)
    physical, weights = (
        np.repeat(of_expert, counts.ravel()).reshape(layers * nodes, -1) for of_expert in (members, node_loads / counts)
    )
    on_gpus = _pack(weights, gpus // nodes)
    _exchange(on_gpus, weights)
    slots = np.take_along_axis(physical, on_gpus.reshape(weights.shape), 1).reshape(layers, replicas)

    copies = np.empty((layers, experts), np.int64)
    np.put_along_axis(copies, members.reshape(layers, -1), counts.reshape(layers, -1), 1)
    return Placement(*map(torch.from_numpy, (slots, _slots_of_experts(slots, copies), copies)))


def balance_of(
    load: Float[Tensor, "L E"] | Int[Tensor, "L E"],
    physical_to_logical: Int[Tensor, "L replicas"],
    copies: Int[Tensor, "L E"],
    gpus: int,
) -> Float[Tensor, " L"]:
    """Load of the busiest GPU over the mean, each copy carrying load / copies; 1 is even, as is a layer without load.

    Raises UserError where `gpus` does not divide the number of physical experts.
    """
    _check_divides("gpus", gpus, "physical experts", physical_to_logical.shape[1])
    of_slot = (load.double() / copies).gather(1, physical_to_logical.long())
    of_gpu = of_slot.unflatten(1, (gpus, -1)).sum(2)
    mean = of_gpu.mean(1)
    return torch.where(mean > 0, of_gpu.amax(1) / mean, 1.0)


def _copies(loads: Float[np.ndarray, "R E"], total: int) -> Int64[np.ndarray, "R E"]:
    """One copy each, then one at a time to the expert whose copies are busiest: the least possible busiest copy."""
    copies = np.ones(loads.shape, np.int64)
    rows = np.arange(len(loads))
    for _ in range(total - loads.shape[1]):
        copies[rows, (loads / copies).argmax(1)] += 1
    return copies


def _pack(weights: Float[np.ndarray, "R N"], packs: int) -> Int64[np.ndarray, "R packs size"]:
    """The items of each pack, as many in each: greedily the heaviest first, into the lightest pack with room."""
    size = weights.shape[1] // packs
    order = np.argsort(-weights, axis=1, kind="stable")
    rows = np.arange(len(weights))
    totals = np.zeros((len(weights), packs))
    filled = np.zeros((len(weights), packs), np.int64)
    packed = np.empty((len(weights), packs, size), np.int64)
    for item in order.T:
        pack = totals.argmin(1)
        place = filled[rows, pack]
        packed[rows, pack, place] = item
        filled[rows, pack] += 1
        totals[rows, pack] += np.where(place == size - 1, np.inf, weights[rows, item])  # a full pack is out
    return packed


def _exchange(packed: Int64[np.ndarray, "R packs size"], weights: Float[np.ndarray, "R N"]) -> None:
    """Makes packs more even in place: they pair up, and each pair exchanges the two items that even it out most.

    By turns the heaviest pack pairs with the lightest, the next with the next, and the heavier half with the lighter
    half in order: what one pairing cannot even out, the other may. No pair's heavier pack ever grows.
    """
    (_, packs, size), half = packed.shape, packed.shape[1] // 2
    rows = np.arange(len(packed))[:, None]
    held = np.take_along_axis(weights, packed.reshape(weights.shape), 1).reshape(packed.shape)
    for turn in range(EXCHANGES):
        totals = held.sum(2)
        rank = np.argsort(-totals, axis=1)
        heavy, light = rank[:, :half], rank[:, packs - half :]
        if turn % 2 == 0:
            light = light[:, ::-1]
        gap = totals[rows, heavy] - totals[rows, light]
        moved = held[rows, heavy][..., :, None] - held[rows, light][..., None, :]
        gap_after = np.abs(gap[..., None, None] - 2 * moved).reshape(*gap.shape, size * size)
        best = gap_after.argmin(2)
        row, pair = np.nonzero(gap_after.min(2) < gap)
        here, there = np.divmod(best[row, pair], size)
        ours, theirs = (row, heavy[row, pair], here), (row, light[row, pair], there)
        for array in (packed, held):
            array[ours], array[theirs] = array[theirs], array[ours]


def _slots_of_experts(
    slots: Int64[np.ndarray, "L replicas"], copies: Int64[np.ndarray, "L E"]
) -> Int64[np.ndarray, "L E most"]:
    order = np.argsort(slots, axis=1, kind="stable")
    expert = np.take_along_axis(slots, order, 1)
    first = np.take_along_axis(copies.cumsum(1) - copies, expert, 1)
    found = np.full((*copies.shape, copies.max()), -1)
    found[np.arange(len(slots))[:, None], expert, np.arange(slots.shape[1]) - first] = order
    return found


def _check(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if load.ndim != 2 or load.numel() == 0:
        raise UserError(f"load has shape {list(load.shape)}; give one row a layer and one column an expert")
    if not bool(torch.isfinite(load).all()) or bool((load < 0).any()):
        raise UserError("load has negative or non-finite entries; give the tokens that each expert got")
    experts = load.shape[1]
    if replicas < experts:
        raise UserError(f"replicas = {replicas} leaves some of the {experts} experts out; give {experts} or more")
    _check_divides("groups", groups, "experts", experts)
    _check_divides("gpus", gpus, "replicas", replicas)
    _check_divides("nodes", nodes, "GPUs", gpus)


def _check_divides(name: str, value: int, whole: str, size: int) -> None:
    if value < 1 or size % value:
        raise UserError(f"{name} = {value} does not divide the number of {whole}, {size}; choose a divisor of it")
