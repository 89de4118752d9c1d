"""Training by several processes against one that accumulates over the same micro-batches."""

import pytest
import torch

from helpers.processes import run
from helpers.training import T, part, rows_of, trainer_of, whole
from rorqual.parallel import context
from rorqual.parallel.mesh import build_mesh
from rorqual.sections import ParallelSection
from rorqual.train.ranks import far_off
from rorqual.train.traffic_report import traffic

ROWS = 8  # of a step
FEW, MANY = 6, 20  # steps


def train(trainer, micro_batches_of, steps):
    return [trainer.step(micro_batches_of(rows_of(step, ROWS)), step / steps) for step in range(steps)]


def on_ranks(rank, layout, options, micro, count):
    mesh = build_mesh(ParallelSection(**layout))
    size = ROWS // mesh.data.size
    trainer = trainer_of(mesh, size // micro, **options)
    own = [slice(i, i + micro) for i in range(size * mesh.data.place, size * (mesh.data.place + 1), micro)]
    steps = train(trainer, lambda batch: [context.part(part(batch, rows), mesh.context) for rows in own], count)
    assert not any(far_off(step.ranks) for step in steps)
    sent = traffic(trainer, ROWS * T, count)["bytes_a_step"]
    with trainer.optimizer.whole_weights():
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    biases = {n: b.clone() for n, b in trainer.model.named_buffers()}
    same = (mesh.pipeline.place, mesh.experts.place)  # ranks that hold the same
    return [m.to_dict() for m in steps], weights, biases, same, trainer.optimizer.state_bytes().moments, sent


MUON = {"name": "muon"}
LAYOUTS = [
    ({"pipeline": 2}, 2, {}),
    ({"pipeline": 2, "data": 2, "experts": 2}, 1, {}),
    ({"context": 2, "data": 2, "experts": 4}, 2, {}),
]
MORE = [
    ({"data": 2, "sharding": "full"}, 2, {"recompute": "v3"}),
    ({"data": 4}, 2, MUON),
    ({"data": 4, "experts": 4, "ranks_per_node": 2}, 2, {}),
    ({"data": 2}, 4, {}),
    ({"data": 8}, 1, {}),
    ({"data": 2, "experts": 2}, 4, {}),
    ({"data": 4, "experts": 2}, 2, MUON),
    ({"data": 4, "experts": 4, "ranks_per_node": 2, "dispatch": "all-to-all"}, 1, {}),
    ({"data": 8, "experts": 8, "ranks_per_node": 4, "overlap": False}, 1, MUON),
    ({"pipeline": 2, "schedule": "1f1b"}, 2, MUON),
    ({"pipeline": 4, "schedule": "zb1p"}, 1, {}),
    ({"pipeline": 2, "data": 4, "experts": 4, "ranks_per_node": 2, "schedule": "1f1b"}, 1, {}),
    ({"pipeline": 2, "data": 4, "experts": 2, "stages_together": True, "schedule": "zb1p"}, 1, {}),
    ({"context": 3}, 8, MUON),
    ({"data": 4, "experts": 2, "sharding": "full"}, 1, MUON | {"recompute": "full"}),
    ({"pipeline": 2, "context": 2, "experts": 2}, 2, {"recompute": "v3"}),
    ({"pipeline": 2, "context": 2, "data": 2}, 1, {"recompute": "full"}),
]


@pytest.mark.parametrize(
    ("layout", "micro", "options", "steps"),
    [
        *((*case, FEW) for case in LAYOUTS),
        *(pytest.param(*case, MANY, marks=pytest.mark.slow) for case in (*LAYOUTS, *MORE)),
    ],
)
def test_losses_and_weights_equal_one_process(layout, micro, options, steps):
    data, contexts, experts, stages = (layout.get(name, 1) for name in ("data", "context", "experts", "pipeline"))
    places = data * contexts
    found = run(places * stages, on_ranks, layout, options, micro, steps)
    alone = trainer_of(**options)
    expected = train(alone, lambda batch: [part(batch, slice(i, i + micro)) for i in range(0, ROWS, micro)], steps)
    stride = (1, stages) if layout.get("stages_together") else (places, 1)  # of a stage, of a place
    ours = whole([found[stage * stride[0] + p * stride[1]] for stage in range(stages) for p in range(experts)], 1)
    theirs = dict(alone.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for metrics, right in zip(found[0][0], expected, strict=True):
        assert metrics["loss"] == pytest.approx(right.loss, rel=1e-5)
        assert metrics["mtp_loss"] == pytest.approx(right.mtp_loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(right.grad_norm, rel=1e-4)
        assert metrics["max_vio_per_layer"] == pytest.approx(right.max_vio_per_layer)
    # Gradients are added in the same order.
    exact = experts == contexts == 1 and (data == 1 or micro * data == ROWS)
    for name, weight in theirs.items():
        if exact:
            assert torch.equal(ours[name], weight), name
        assert (ours[name] - weight).norm() <= 1e-5 * weight.norm(), name
    for name, bias in alone.model.named_buffers():
        assert any(torch.equal(rank[2][name], bias) for rank in found if name in rank[2])
    for rank in found[1:]:  # replicas have the same bits
        if rank[3] == found[0][3]:
            assert all(torch.equal(found[0][1][name], w) for name, w in rank[1].items())
    moments = sum(rank[4] for rank in found)  # each is kept once
    assert moments == alone.optimizer.state_bytes().moments
    for what, row in found[0][5].items():
        if not what.startswith(("dispatch", "combine")):  # routing is not as even as is computed
            assert row["counted"] == row["computed"], what
