"""What a layout moves between processes, computed: a run prints it beside what it counted."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from rorqual.model import ModelConfig
from rorqual.model.moe import Router
from rorqual.parallel.data import is_expert
from rorqual.parallel.group import Group, Link
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.parcels import EMBEDDINGS, HIDDEN, Flow
from rorqual.plan.traffic import ExpertGroup, journey_rows, row_bytes

SAMPLES = 1024  # tokens that are routed at random
Bytes = Counter[tuple[str, Link]]  # by operation and link, sent by this rank


def dispatch_bytes(config: ModelConfig, mesh: Mesh, tokens: int, itemsize: int, layers: int, again: bool) -> Bytes:
    """Of tokens to and from experts in a training step, if every expert is as likely as any other.

    tokens: of this rank; layers: mixture layers of this rank; again: forward passes run twice (recomputation).
    """
    group, dispatch, moe = mesh.experts, mesh.section.dispatch, config.moe
    found: Bytes = Counter()
    if group.size == 1 or not layers:
        return found
    per_node = mesh.node.size
    chosen = _random_choices(config)
    sharing = ExpertGroup(moe.n_routed_experts, group.size, per_node)
    rows = journey_rows([chosen] * group.size, sharing, dispatch)
    for backward in (False, True) if not again else (False, False, True):
        there, back = row_bytes(dispatch, config.hidden_size, moe.num_experts_per_tok, itemsize, backward)
        for link, number in rows.items():
            each = number / group.size / len(chosen) * tokens * layers
            found["dispatch", link] += round(each * there)
            found["combine", link] += round(each * back)
    return found


def sharding_bytes(mesh: Mesh, parameters: Mapping[str, Tensor]) -> Bytes:
    """Of gradients to the ranks that own rows, and of updated rows to the others, in a training step.

    Rows are counted as spread evenly, which tensors of few rows are not.
    """
    found: Bytes = Counter()
    shares = {group.ranks: _shares(group) for group in (mesh.replicas, mesh.tokens)}
    for name, p in parameters.items():
        group = mesh.replicas if is_expert(name) else mesh.tokens
        for link, share in shares[group.ranks].items():
            found["gradients", link] += round(share * p.numel() * torch.float32.itemsize / group.size)
            found["weights", link] += round(share * p.nbytes / group.size)
    return found


def stage_bytes(mesh: Mesh, flow: Flow, hidden: int) -> Bytes:
    """Of what this rank sends to other stages in a training step; hidden: bytes of all its tokens' hidden states."""
    ranks, group, found = flow.schedule.rank_of_stage, mesh.pipeline, Counter[tuple[str, Link]]()
    ways = [(HIDDEN, a, b) for a, b in pairwise(ranks)] + [(EMBEDDINGS, ranks[0], ranks[-1])] * flow.embeddings
    for what, start, end in ways:
        if group.place == start != end:
            found[what, group.link(end)] += hidden
        if group.place == end != start:
            found[f"gradients of {what}", group.link(start)] += hidden
    return found


def _shares(group: Group) -> dict[Link, int]:
    """Number of other places by link."""
    found: Counter[Link] = Counter()
    for place in range(group.size):
        if place != group.place:
            found[group.link(place)] += 1
    return dict(found)


@torch.no_grad()
def _random_choices(config: ModelConfig) -> Tensor:
    """Experts [SAMPLES, K] as the router's groups allow them, from random scores."""
    generator = torch.Generator().manual_seed(0)
    router = Router(config)
    router.weight.normal_(std=config.hidden_size**-0.5, generator=generator)  # larger scores would be 1, all alike
    return router(torch.randn(SAMPLES, config.hidden_size, generator=generator))[1]
