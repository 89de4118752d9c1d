"""Rows that a token sends to experts, and their bytes, where every expert is as likely as any other.

As traffic.py counts them for a given routing, but without torch, whose import takes longer than a plan.
"""

import random
from collections import Counter
from functools import cache
from heapq import nlargest
from typing import Literal

from rorqual.model.config import ModelConfig

Link = Literal["between nodes", "within a node"]

WEIGHT, EXPERT = 4, 2  # bytes: of a token's weight for an expert, an expert's number
SAMPLES = 1024  # tokens that are routed at random
TILE = 128  # values that share a one-byte scale in FP8


def row_bytes(dispatch: str, hidden: int, k: int, itemsize: int, backward: bool = False) -> tuple[float, float]:
    """Of one row to the experts and one back, in the forward pass or in the backward pass.

    `itemsize`: of the compute dtype. To the experts a token takes its weights along in the forward pass; in the
    backward pass their gradients come back.
    """
    copies = 1 if dispatch == "all-to-all" else k
    fp8 = dispatch.endswith("-fp8")
    there = hidden - (-hidden // TILE) if fp8 else hidden * itemsize
    back = hidden * (2 if fp8 else itemsize)
    if backward:
        return there, back + copies * WEIGHT
    return there + copies * (WEIGHT + EXPERT), back


@cache
def expected_rows(config: ModelConfig, ranks: int, per_node: int, dispatch: str) -> Counter[Link]:
    """Rows that a token sends, by link; as many come back. `ranks` share the experts, `per_node` of them on a node.

    Those of rank 0, since all ranks send as much.
    """
    each, found = config.moe.n_routed_experts // ranks, Counter[Link]()
    for chosen in random_choices(config):
        reached = [expert // each for expert in chosen]
        if dispatch == "all-to-all":
            found["within a node"] += sum(0 < rank < per_node for rank in reached)
            found["between nodes"] += sum(rank >= per_node for rank in reached)
            continue
        # Tokens reach a node at the sender's place in it, and the node's other ranks from there.
        found["within a node"] += sum(rank % per_node > 0 for rank in set(reached))
        found["between nodes"] += len({rank // per_node for rank in reached} - {0})
    return Counter({link: number / SAMPLES for link, number in found.items()})


@cache
def random_choices(config: ModelConfig) -> list[list[int]]:
    """Experts of each of many tokens as the router's groups allow them, from random scores (model/moe.py)."""
    moe, generator = config.moe, random.Random(0)
    size = moe.n_routed_experts // moe.n_group
    best = 2 if moe.topk_method == "noaux_tc" else 1  # scores of a group that count
    grouped = moe.topk_group < moe.n_group and moe.topk_method != "greedy"
    found: list[list[int]] = []
    for _ in range(SAMPLES):
        scores = [generator.random() for _ in range(moe.n_routed_experts)]
        experts = range(moe.n_routed_experts)
        if grouped:
            groups = [scores[g * size : (g + 1) * size] for g in range(moe.n_group)]
            kept = nlargest(moe.topk_group, range(moe.n_group), key=lambda g: sum(nlargest(best, groups[g])))
            experts = [expert for g in kept for expert in range(g * size, (g + 1) * size)]
        found.append(nlargest(moe.num_experts_per_tok, experts, key=scores.__getitem__))
    return found
