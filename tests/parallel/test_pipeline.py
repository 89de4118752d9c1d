"""Pipelines against one process that accumulates over the same micro-batches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers.processes import run
from helpers.small_configs import LATENT
from rorqual.data.loader import Batch
from rorqual.errors import UserError
from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.model import Transformer
from rorqual.parallel.courier import Courier
from rorqual.parallel.experts import spread_experts
from rorqual.parallel.mesh import build_mesh, single
from rorqual.parallel.pipeline import EMBEDDING, Pipeline
from rorqual.plan.schedule import SCHEDULES
from rorqual.precision.convert import convert
from rorqual.precision.recompute import Activations
from rorqual.sections import ParallelSection

CONFIG = replace(
    LATENT,
    num_hidden_layers=9,
    first_k_dense_replace=2,
    num_nextn_predict_layers=2,
    hidden_size=16,
    num_attention_heads=2,
)
MICRO_BATCHES = 7


def model_of(config=CONFIG, dtype=torch.float32, precision=None):
    torch.manual_seed(0)
    model = Transformer(config)
    if precision:
        convert(model, precision)
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.endswith("gate.weight"):
            p.data = p.data.to(dtype)
    return model.train()


def batches(count=MICRO_BATCHES, seed=0):
    """Two documents in each row; the micro-batches have lengths of their own."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        length = 8 + number % 3
        tokens = torch.randint(0, 60, (2, length + 1), generator=generator)
        documents = (torch.arange(length) >= 3 + number % 4).long().expand(2, -1)
        positions = torch.arange(length) - documents * (3 + number % 4)
        weights = torch.rand(2, length, generator=generator)
        found.append(Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, documents))
    return found


class Loss:
    """Cross-entropy, that of the multi-token modules, and the balance loss."""

    def __init__(self, model):
        self.model, self.found = model, []

    def losses(self, hidden, batch, routing):
        ahead = self.model.mtp_hidden_states(hidden, batch.inputs, batch.positions, batch.attention_mask, routing)
        weights, total = batch.weights.flatten(), hidden.new_zeros((), dtype=torch.float32)
        for state, share in zip((hidden, *ahead), (1.0, 0.2, 0.1), strict=False):
            flat = state.flatten(0, 1)
            loss = linear_cross_entropy(flat, self.model.head_weight, batch.targets.flatten(), weights)
            total = total + share * loss
        self.found.append(float(total.detach()))
        return total

    def auxiliary(self, routing, batch):
        return 0.3 * sum(r.sequence_loss for r in routing) if routing else None


class Sums:
    """As the trainer's optimizer has them: FP32, and gradients are freed."""

    def __init__(self, model):
        self.parameters, self.found = dict(model.named_parameters()), {}

    def add(self):
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.found[name] = self.found[name] + p.grad if name in self.found else p.grad.float()
                p.grad = None


def one_process(model, micro_batches):
    """Gradients, losses, loads and hidden states."""
    sums, loss, loads = Sums(model), Loss(model), 0
    for batch in micro_batches:
        routing = []
        hidden = model(batch.inputs, batch.positions, batch.attention_mask, routing=routing)
        total = loss.losses(hidden, batch, routing)
        (total + loss.auxiliary(routing, batch)).backward()
        loads = loads + torch.stack([r.load for r in routing])
        sums.add()
    with torch.no_grad():
        hidden = [model(b.inputs, b.positions, b.attention_mask) for b in micro_batches]
    return sums.found, loss.found, list(loads), hidden


def on_ranks(rank, cases, section):
    mesh, found = build_mesh(section), []
    courier = Courier()
    for schedule, recompute, options in cases:
        model = model_of(**options)
        spread_experts(model, mesh, courier)
        activations = Activations(model, recompute)
        pipeline = Pipeline(model, mesh, courier, schedule, MICRO_BATCHES, activations.kept)
        sums, loss = Sums(model), Loss(model)
        own = batches(seed=mesh.data.place)
        mesh.traffic.sent.clear()
        pipeline.run(own, loss, sums.add)
        sent = {what: count for (what, _), count in mesh.traffic.sent.items()}
        pipeline.sum_copies(sums.found)
        hidden = pipeline.evaluate(own[:3])
        times = pipeline.measured_times()
        assert sum(times.values()) <= pipeline.busy <= pipeline.last_timeline.length
        found.append((sums.found, loss.found, pipeline.loads, hidden, list(times), sorted(pipeline.copies), sent))
    courier.close()
    return found


PLAIN = [(schedule, "none", {}) for schedule in SCHEDULES]
AGAIN = [("zb1p", "v3", {}), ("dualpipev", "full", {})]
FP8 = [("dualpipev", "v3", {"dtype": torch.bfloat16, "precision": "fp8"})]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, PLAIN), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, AGAIN), (4, PLAIN), (2, FP8)))],
)
def test_gradients_are_the_bits_of_one_process(ranks, cases):
    results = run(ranks, on_ranks, cases, ParallelSection(pipeline=ranks))
    for number, (schedule, recompute, options) in enumerate(cases):
        grads, losses, loads, hidden = one_process(model_of(**options), batches())
        parts = [rank[number] for rank in results]
        last = 0 if schedule == "dualpipev" else ranks - 1
        assert sum(len(part[0]) for part in parts) == len(grads)
        for part in parts:
            for name, gradient in part[0].items():
                assert torch.equal(gradient, grads[name]), (schedule, recompute, name)
        assert parts[last][1] == losses
        assert len(loads) == sum(len(part[2]) for part in parts)
        if schedule != "dualpipev":
            assert all(map(torch.equal, [load for part in parts for load in part[2]], loads))
        assert all(map(torch.equal, parts[last][3], hidden))
        assert all(part[3] is None for rank, part in enumerate(parts) if rank != last)
        if not options:
            assert sum((Counter(part[6]) for part in parts), Counter()) == sent_by(schedule, ranks)
        kinds = {kind for part in parts for kind, _ in part[4]}
        assert kinds == {"1f1b": {"F", "B"}, "zb1p": {"F", "I", "W"}, "dualpipev": {"F", "B", "I", "W", "FB"}}[schedule]


def sent_by(schedule, ranks):
    """Bytes in FP32: over every border of two ranks there and back; embeddings where the last stage is elsewhere."""
    each = sum(batch.inputs.numel() for batch in batches()) * CONFIG.hidden_size * 4
    hidden = each * (ranks - 1) * (2 if schedule == "dualpipev" else 1)
    ahead = 0 if schedule == "dualpipev" else 2 * each
    return +Counter({
        "hidden states": hidden, "gradients of hidden states": hidden,
        "embeddings": ahead, "gradients of embeddings": ahead,
    })  # fmt: skip


def test_a_tied_embedding_is_on_two_ranks():
    options = {"config": replace(CONFIG, tie_word_embeddings=True)}
    cases = [(schedule, "none", options) for schedule in SCHEDULES]
    results = run(2, on_ranks, cases, ParallelSection(pipeline=2))
    grads, *_ = one_process(model_of(**options), batches())
    for number, schedule in enumerate(SCHEDULES):
        first, second = (rank[number] for rank in results)
        found = first[0] | second[0]
        assert found.keys() == grads.keys()
        torch.testing.assert_close(found.pop(EMBEDDING), grads[EMBEDDING], rtol=1e-6, atol=1e-6)
        assert all(torch.equal(gradient, grads[name]) for name, gradient in found.items())
        if schedule == "dualpipev":
            assert EMBEDDING not in second[0]
        else:
            assert torch.equal(first[0][EMBEDDING], second[0][EMBEDDING])
        assert (first[5], second[5]) == ([], [EMBEDDING] * (schedule != "dualpipev"))


@pytest.mark.parametrize(
    "cases",
    [
        [("dualpipev", "none", {})],
        pytest.param([("zb1p", "full", {}), ("zb1p", "none", {}), ("dualpipev", "full", {})], marks=pytest.mark.slow),
    ],
    ids=["dualpipev", "others"],
)
def test_with_expert_parallelism(cases):
    """Two stages on two ranks each, which have tokens of their own and half of the experts each."""
    section = ParallelSection(pipeline=2, data=2, experts=2)
    results = run(4, on_ranks, cases, section)
    grads, *_ = one_process(model_of(), batches() + batches(seed=1))
    for number in range(len(cases)):
        for stage in (0, 2):
            first, second = results[stage][number][0], results[stage + 1][number][0]
            assert first.keys() == second.keys()
            for name in first:
                joined = torch.cat if ".experts." in name else sum
                error = joined([first[name], second[name]]) - grads[name]
                assert error.norm() <= 1e-6 * grads[name].norm(), name


def test_one_rank_has_every_stage():
    for schedule in SCHEDULES:
        model = model_of()
        pipeline, sums = Pipeline(model, single(), Courier(), schedule, 3), Sums(model)
        pipeline.run(batches(3), Loss(model), sums.add)
        grads, _, loads, _ = one_process(model_of(), batches(3))
        assert all(torch.equal(gradient, grads[name]) for name, gradient in sums.found.items())
        assert sums.found.keys() == grads.keys()
        assert all(map(torch.equal, pipeline.loads, loads))


def test_what_cannot_be():
    with pytest.raises(UserError, match="choose one of 1f1b, zb1p, dualpipev"):
        Pipeline(model_of(), single(), Courier(), "gpipe", 3)
    with pytest.raises(ValueError, match="2 micro-batches for a schedule of 3"):
        Pipeline(model_of(), single(), Courier(), "1f1b", 3).run(batches(2), Loss(None), lambda: None)
