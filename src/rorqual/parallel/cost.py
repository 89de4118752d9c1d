"""What a layout moves between processes, computed: a run prints it beside what it counted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

from torch import Tensor

from rorqual.model import ModelConfig
from rorqual.parallel.context import KEYS
from rorqual.parallel.data import Sharding
from rorqual.parallel.group import Group, Link
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.parcels import EMBEDDINGS, HIDDEN, Flow
from rorqual.plan.expected_rows import row_bytes
from rorqual.plan.traffic import ExpertGroup, journey_rows, random_choices

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
    chosen = random_choices(config)
    sharing = ExpertGroup(moe.n_routed_experts, group.size, per_node)
    rows = journey_rows([chosen] * group.size, sharing, dispatch)
    for backward in (False, True) if not again else (False, False, True):
        there, back = row_bytes(dispatch, config.hidden_size, moe.num_experts_per_tok, itemsize, backward)
        for link, number in rows.items():
            each = number / group.size / len(chosen) * tokens * layers
            found["dispatch", link] += round(each * there)
            found["combine", link] += round(each * back)
    return found


def context_bytes(config: ModelConfig, mesh: Mesh, tokens: int, itemsize: int, layers: int, again: bool) -> Bytes:
    """Of keys and values to the ranks that share a sequence, and of their gradients, in a training step.

    As in `dispatch_bytes`, but of all layers of this rank; again: attention runs twice.
    """
    if config.is_mla:
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
    else:
        width = 2 * config.gqa.num_key_value_heads * config.gqa.head_dim
    once = tokens * layers * width * itemsize
    found: Bytes = Counter()
    for link, share in _shares(mesh.context).items():
        found[KEYS, link] += share * once * (2 if again else 1)
        found[f"gradients of {KEYS}", link] += share * once
    return found


def sharding_bytes(
    meshes: Iterable[Mesh], sharding: Sharding, parameters: Mapping[str, Tensor],
    layers: Sequence[Mapping[str, Tensor]] = (), micro_batches: int = 1,
) -> list[Bytes]:  # fmt: skip
    """Of gradients to the ranks that own rows, and of rows to the others, in a training step: sent by each of some
    ranks with the same parameters.

    layers: those of full sharding, whose gradients are sent once and whose weights are sent twice for each micro-batch
    of this rank.
    """
    gathered = frozenset(chain.from_iterable(layers))
    rest = {name: p for name, p in parameters.items() if name not in gathered}
    gradients, weights = {True: Counter[int](), False: Counter[int]()}, Counter[bool]()  # by place; of routed experts?
    for some, times, gathers in [(rest, 1, 1), *((layer, micro_batches, 2 * micro_batches) for layer in layers)]:
        for experts, to_owners, own in sharding.sizes(some):
            gradients[experts].update({place: times * number for place, number in enumerate(to_owners)})
            weights[experts] += gathers * own
    sent: list[Bytes] = []
    for mesh in meshes:
        found: Bytes = Counter()
        for experts, group in ((True, mesh.replicas), (False, mesh.tokens)):
            for place in range(group.size):
                if place != group.place:
                    found["gradients", group.link(place)] += gradients[experts][place]
                    found["weights", group.link(place)] += weights[experts]
        sent.append(found)
    return sent


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
