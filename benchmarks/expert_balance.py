"""Placement of DeepSeek-V3's routed experts with 32 redundant copies: milliseconds, and how even the GPUs' load is.

58 layers of 256 experts in 8 groups, as DeepSeek serves them (overview of its inference system): prefill on 4 nodes
of 8 GPUs, which keeps groups on nodes, and decode on 18 nodes, which does not. The loads are random (lognormal), not
measured. Balance is the busiest GPU's load over the mean, averaged over layers. One thread computes.
"""

import heapq
import statistics
import time
from typing import Any, NamedTuple

import torch

from common import arguments, program, report, take_turns
from rorqual.parallel.balance import balance_of, rebalance_experts


class Shape(NamedTuple):
    replicas: int
    groups: int
    nodes: int
    gpus: int


LAYERS, EXPERTS = 58, 256
SHAPES = {"prefill": Shape(288, 8, 4, 32), "decode": Shape(288, 8, 18, 144)}
SPREADS = (0.5, 1.0)  # standard deviation of the load's logarithm


def greedy_packs(weights: list[float], count: int) -> list[list[int]]:
    """Heaviest first, each into the lightest pack that has room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    with_room = [(0.0, pack) for pack in range(count)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        total, pack = heapq.heappop(with_room)
        packs[pack].append(item)
        if len(packs[pack]) * count < len(weights):
            heapq.heappush(with_room, (total + weights[item], pack))
    return packs


def published_greedy(load: list[float], shape: Shape) -> float:
    """Balance of one layer's experts, placed as EPLB's README describes: greedily at each level, nothing after it."""
    replicas, groups, nodes, gpus = shape
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    of_groups = [load[g * size : (g + 1) * size] for g in range(groups)]
    gpu_loads: list[float] = []
    for node in greedy_packs([sum(loads) for loads in of_groups], nodes):
        loads = [x for g in node for x in of_groups[g]]
        copies = [1] * len(loads)
        while sum(copies) < replicas // nodes:
            copies[max(range(len(loads)), key=lambda e: loads[e] / copies[e])] += 1
        weights = [x / n for x, n in zip(loads, copies, strict=True) for _ in range(n)]
        gpu_loads += [sum(weights[i] for i in gpu) for gpu in greedy_packs(weights, gpus // nodes)]
    return max(gpu_loads) / statistics.mean(gpu_loads)


def without_copies(load: torch.Tensor, gpus: int) -> float:
    """Experts in order, as many on each of at most `gpus` GPUs."""
    gpus = max(n for n in range(1, gpus + 1) if load.shape[1] % n == 0)
    in_order = torch.arange(load.shape[1]).expand(load.shape)
    return balance_of(load, in_order, torch.ones_like(in_order), gpus).mean().item()


def main() -> None:
    args = arguments(__doc__)
    layers, rounds = (2, 2) if args.quick else (LAYERS, 20)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, Any] = {"milliseconds": {}, "balance": {}}
    ratios: dict[str, float] = {}
    rows: list[list[Any]] = []
    for spread in SPREADS:
        load = (spread * torch.randn(layers, EXPERTS, dtype=torch.float64)).exp()
        for name, shape in SHAPES.items():

            def seconds(load: torch.Tensor = load, shape: Shape = shape) -> float:
                start = time.perf_counter()
                rebalance_experts(load, *shape)
                return time.perf_counter() - start

            key = f"{name}-{spread:g}"
            placed = rebalance_experts(load, *shape)  # warms up
            took = 1e3 * statistics.median(take_turns({"": seconds}, rounds)[""])
            balance = {
                "without copies": without_copies(load, shape.gpus),
                "published greedy": statistics.mean(published_greedy(row, shape) for row in load.tolist()),
                "ours": balance_of(load, placed.physical_to_logical, placed.copies, shape.gpus).mean().item(),
            }
            figures["milliseconds"][key] = took
            figures["balance"][key] = balance
            ratios[f"balance-{key}/published-greedy"] = balance["published greedy"] / balance["ours"]
            rows.append([key, took, *(f"{value:.4f}" for value in balance.values())])
    columns = ["phase and spread of loads", "ms", *(f"balance, {how}" for how in figures["balance"][rows[0][0]])]
    title = f"{layers} layers, {EXPERTS} experts in 288 slots"
    report("expert_balance", args, ratios, figures, [(title, columns, rows)], ["numpy", "torch"])


if __name__ == "__main__":
    program(main)
