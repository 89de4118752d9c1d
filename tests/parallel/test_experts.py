"""Expert parallelism against the same experts in one process."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.processes import run
from rorqual.model import ModelConfig
from rorqual.model.moe import MixtureOfExperts
from rorqual.parallel.courier import Courier
from rorqual.parallel.experts import ExpertParallel, present
from rorqual.parallel.mesh import build_mesh
from rorqual.plan.traffic import ExpertGroup, journey_bytes
from rorqual.sections import ParallelSection

E, K, D = 16, 4, 48
KINDS = ("all-to-all", "two-hop", "two-hop-fp8")


def config():
    return ModelConfig.from_dict({
        "model_type": "deepseek_v3", "vocab_size": 32, "hidden_size": D, "num_hidden_layers": 1,
        "n_group": 4, "topk_group": 2,
        "num_attention_heads": 2, "n_routed_experts": E, "num_experts_per_tok": K, "n_shared_experts": 1,
        "moe_intermediate_size": 24, "intermediate_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0,
    })  # fmt: skip


def layer():
    torch.manual_seed(0)
    layer = MixtureOfExperts(config())
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return layer


def case(routing, world, seed, tokens):
    """Tokens, weights and chosen experts of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(world * tokens, D, generator=generator)
    scores = torch.rand(world * tokens, E, generator=generator)
    if routing == "one rank":  # all tokens to the last rank's experts, the others get none
        scores[:, -E // world :] += 1
    chosen = scores.topk(K).indices
    return x, torch.rand(world * tokens, K, generator=generator), chosen


def outputs(layer, experts, x, weights, chosen, shared):
    """Output, gradients of tokens and weights, and those of the parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out, load = layer.dispatcher(experts, x, weights, chosen, shared)
    (out * torch.linspace(-1, 1, D)).square().sum().backward()
    return out.detach(), x.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad, load


def on_ranks(rank, kind, experts, per_node, cases, overlap=True):
    world = torch.distributed.get_world_size()
    section = ParallelSection(data=world, experts=experts, ranks_per_node=per_node, dispatch=kind)
    mesh, found = build_mesh(section), []
    courier = Courier(overlap)
    for routing, seed, tokens in cases:
        whole = layer()
        x, weights, chosen = (t.split(tokens)[rank] for t in case(routing, world, seed, tokens))
        own = E // experts
        mine = copy.deepcopy(whole.experts)
        for name, p in whole.experts.named_parameters():
            setattr(mine, name, torch.nn.Parameter(p.detach()[own * mesh.experts.place :][:own].clone()))
        whole.dispatcher = ExpertParallel(mesh, E, courier)
        mesh.traffic.sent.clear()
        found.append((outputs(whole, mine, x, weights, chosen, whole.shared_experts), dict(mesh.traffic.sent)))
    return found


CASES = [("random", 1, 13), ("one rank", 2, 7), ("random", 3, 1)]


@pytest.mark.parametrize(
    ("world", "experts", "per_node"),
    [(4, 4, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 2, 4), (8, 8, 4), (4, 4, 1)])],
)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_one_process(kind, world, experts, per_node):
    ranks = run(world, on_ranks, kind, experts, per_node, CASES)
    exact = 0.1 if kind == "two-hop-fp8" else 1e-5  # E4M3 rounds tokens and gradients by 0.026 each
    for number, (routing, seed, tokens) in enumerate(CASES):
        whole = layer()
        x, weights, chosen = case(routing, world, seed, tokens)
        out, gx, gw, gate_up, down, load = outputs(whole, whole.experts, x, weights, chosen, whole.shared_experts)
        found = [rank[number][0] for rank in ranks]
        for ours, theirs in ((0, out), (1, gx), (2, gw)):
            together = torch.cat([f[ours] for f in found])
            assert (together - theirs).norm() <= exact * theirs.norm()
        for ours, theirs in ((3, gate_up), (4, down)):  # summed over the replicas of an expert
            replicas = [torch.cat([f[ours] for f in found[i : i + experts]]) for i in range(0, world, experts)]
            assert (sum(replicas) - theirs).norm() <= exact * theirs.norm()
        assert torch.equal(sum(f[5] for f in found), load)
        sent = sum((Counter(rank[number][1]) for rank in ranks), Counter())
        assert sent == bytes_of(chosen.split(tokens), kind, experts, per_node)


def bytes_of(chosen, kind, experts, per_node):
    """What a forward and a backward pass send, counted row by row; groups of `experts` ranks follow each other."""
    sent = Counter()

    def send(what, a, b, size):
        if a != b:
            sent[what, "within a node" if a // per_node == b // per_node else "between nodes"] += size

    tokens_there = {"two-hop-fp8": D + 1}.get(kind, 4 * D)
    tokens_back = {"two-hop-fp8": 2 * D}.get(kind, 4 * D)
    k = 1 if kind == "all-to-all" else K

    def row(a, b):  # tokens with weights and experts, gradients of outputs; outputs, gradients of tokens and weights
        send("dispatch", a, b, tokens_there + 6 * k + tokens_there)
        send("combine", b, a, tokens_back + tokens_back + 4 * k)

    for source, rows in enumerate(chosen):
        first = source // experts * experts
        for token in rows.tolist():
            ranks = [first + e // (E // experts) for e in token]
            if kind == "all-to-all":
                for rank in ranks:
                    row(source, rank)
                continue
            for node in {rank // per_node for rank in ranks}:
                relay = max(first, node * per_node) + (source - first) % min(per_node, experts)
                row(source, relay)
                for rank in {rank for rank in ranks if rank // per_node == node}:
                    row(relay, rank)
        group = range(first, first + experts)
        for rank in group:
            same_node = rank // per_node == source // per_node
            if kind == "all-to-all" or same_node or (rank - source) % per_node == 0:
                send("dispatch counts", source, rank, 8)
    return sent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (8, 4), (8, 8), (4, 1)])
def test_the_planner_counts_the_same_bytes(kind, ranks, per_node):
    chosen = case("random", ranks, 5, 11)[2].split(11)
    found = journey_bytes(chosen, ExpertGroup(E, ranks, per_node), kind, D, 4, passes=(False, True))
    assert found == bytes_of(chosen, kind, ranks, per_node)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 8), st.integers(0, 1 << 30))
def test_places_occur_once(tokens, k, places, seed):
    place = torch.randint(-1, places + 2, (tokens, k), generator=torch.Generator().manual_seed(seed))
    found = present(place, places)
    for row, columns in zip(place.tolist(), found.tolist(), strict=True):
        assert columns == [p if p in row else -1 for p in range(places)]
