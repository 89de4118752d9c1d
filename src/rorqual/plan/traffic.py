"""Bytes that tokens on their way to experts put on the links, from a routing (V3 §3.2.2). parallel/experts.py sends
them; the two counts are asserted equal.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rorqual.model import ModelConfig
from rorqual.model.moe import Router
from rorqual.plan.expected_rows import SAMPLES, Link, row_bytes
from rorqual.shapes import Int

COUNT = 8  # bytes of a number of rows


@dataclass(frozen=True)
class ExpertGroup:
    """Ranks that share a layer's routed experts, numbered from 0, `per_node` of them on a node."""

    experts: int
    ranks: int
    per_node: int

    def rank(self, expert: Tensor) -> Tensor:
        return expert // (self.experts // self.ranks)

    def node(self, rank: int) -> int:
        return rank // self.per_node


def journey_rows(chosen: Sequence[Int[Tensor, "N K"]], group: ExpertGroup, dispatch: str) -> Counter[Link]:
    """Rows that all ranks together send to experts, by link; `chosen`: by rank. As many come back."""
    found: Counter[Link] = Counter()
    for source, own in enumerate(chosen):
        if dispatch == "all-to-all":
            for rank, rows in enumerate(torch.bincount(group.rank(own).flatten(), minlength=group.ranks).tolist()):
                if rank != source:
                    found[_link(group, source, rank)] += rows
            continue
        to_rank = _tokens(group.rank(own), group.ranks)
        to_node = _tokens(group.rank(own) // group.per_node, group.node(group.ranks - 1) + 1)
        for rank in range(group.ranks):
            # Tokens reach a rank from the rank of the source's place in its node.
            relay = group.node(rank) * group.per_node + source % group.per_node
            if rank != relay:
                found["within a node"] += to_rank[rank]
            if rank == relay and rank != source:
                found["between nodes"] += to_node[group.node(rank)]
    return found


def _tokens(places: Int[Tensor, "N K"], count: int) -> list[int]:
    """Number of rows in which each of `count` places occurs."""
    found = torch.zeros(len(places), count, dtype=torch.bool, device=places.device)
    return found.scatter_(1, places.to(torch.int64), True).sum(0).tolist()


def _link(group: ExpertGroup, a: int, b: int) -> Link:
    return "within a node" if group.node(a) == group.node(b) else "between nodes"


@cache
@torch.no_grad()
def random_choices(config: ModelConfig) -> Int[Tensor, "N K"]:
    """Experts as the router's groups allow them, from random scores."""
    generator = torch.Generator().manual_seed(0)
    router = Router(config)
    router.weight.normal_(std=config.hidden_size**-0.5, generator=generator)  # larger scores would be 1, all alike
    return router(torch.randn(SAMPLES, config.hidden_size, generator=generator))[1]


def journey_bytes(
    chosen: Sequence[Int[Tensor, "N K"]], group: ExpertGroup, dispatch: str, hidden: int, itemsize: int,
    passes: Sequence[bool] = (False,),
) -> Counter[tuple[str, Link]]:  # fmt: skip
    """Bytes that all ranks together send for one layer, by (operation, link); `passes`: is each a backward pass?"""
    rows, found = journey_rows(chosen, group, dispatch), Counter[tuple[str, Link]]()
    for backward in passes:
        there, back = row_bytes(dispatch, hidden, chosen[0].shape[1], itemsize, backward)
        for link, number in rows.items():
            found["dispatch", link] += round(number * there)
            found["combine", link] += round(number * back)
    n, per_node = group.ranks, min(group.per_node, group.ranks)
    nodes = n // per_node
    if dispatch == "all-to-all":
        found["dispatch counts", "within a node"] = n * (per_node - 1) * COUNT
        found["dispatch counts", "between nodes"] = n * (n - per_node) * COUNT
    else:
        found["dispatch counts", "within a node"] = n * (per_node - 1) * COUNT
        found["dispatch counts", "between nodes"] = n * (nodes - 1) * COUNT
    return +found
