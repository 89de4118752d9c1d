"""Checkpoints that several processes write, and any number of processes reads."""

import json

import pytest
import torch

from helpers.processes import run
from helpers.training import CONFIG, part, rows_of, trainer_of, whole
from rorqual.checkpoint.huggingface import load_model
from rorqual.errors import UserError
from rorqual.parallel.export import save_parts
from rorqual.parallel.mesh import build_mesh, single
from rorqual.sections import ParallelSection
from rorqual.train import sharded_checkpoints
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.sharded_checkpoints import ShardedCheckpoints

ROWS = 8


def train(trainer, mesh, first, last):
    size = ROWS // mesh.data.size
    own = slice(size * mesh.data.place, size * (mesh.data.place + 1))
    for step in range(first, last):
        trainer.step([part(rows_of(step, ROWS), own)], 0.5)


def store_of(mesh, folder, trainer):
    if mesh.section.processes == 1:
        return Checkpoints(folder, 3, lambda _: None)
    return ShardedCheckpoints(folder, 3, mesh, trainer.slices, lambda _: None)


def save(rank, folder, layout, options):
    """Steps 0–3, a checkpoint, and 4–7 with another; the weights at the end."""
    mesh = build_mesh(ParallelSection(**layout))
    trainer = trainer_of(mesh, **options)
    store = store_of(mesh, folder, trainer)
    for first in (0, 4):
        train(trainer, mesh, first, first + 4)
        store.save(first + 4, trainer.own_tensors(), {"trainer": trainer.state()})
    store.finish()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def resume(rank, folder, layout, options, last):
    mesh = build_mesh(ParallelSection(**layout))
    trainer = trainer_of(mesh, **options)
    step, tensors, state = store_of(mesh, folder, trainer).load_latest()
    trainer.load(tensors, state["trainer"])
    train(trainer, mesh, step, last)
    return step, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


FOUR = {"data": 4, "experts": 2}


@pytest.mark.parametrize("options", [{}, pytest.param({"moments": "8bit", "name": "muon"}, marks=pytest.mark.slow)])
def test_every_number_of_processes_resumes(tmp_path, options):
    straight = run(4, save, tmp_path, FOUR, options)
    expected = whole([{"weights": w} for w in straight[:2]], "weights")
    (tmp_path / "checkpoints" / "step-8").rename(tmp_path / "later")
    for layout in (FOUR, {"data": 2, "experts": 2}, {"data": 2}):
        found = run(layout["data"], resume, tmp_path, layout, options, 8)
        assert all(step == 4 for step, _ in found)
        ours = whole([{"weights": w} for _, w in found[: layout.get("experts", 1)]], "weights")
        for name, weight in expected.items():
            if layout == FOUR:
                assert torch.equal(ours[name], weight), name
            # 8 bits round moments of sums that differ in the last bit to other codes.
            assert (ours[name] - weight).norm() <= (1e-5 if not options else 1e-2) * weight.norm(), name
    step, ours = resume(0, tmp_path, {}, options, 4)
    assert step == 4
    (tmp_path / "later").rename(tmp_path / "checkpoints" / "step-8")
    _, ours = resume(0, tmp_path, {}, options, 8)
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())  # as they were saved


def test_several_resume_what_one_wrote(tmp_path):
    save(0, tmp_path, {}, {})
    (step, ours), *_ = run(2, resume, tmp_path, {"data": 2}, {}, 8)
    (_, expected) = resume(0, tmp_path, {}, {}, 8)
    assert step == 8
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


def test_a_damaged_part_is_set_aside(tmp_path):
    run(2, save, tmp_path, {"data": 2}, {})
    path = tmp_path / "checkpoints" / "step-8" / "tensors-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    found = run(2, resume, tmp_path, {"data": 2}, {}, 4)
    assert [step for step, _ in found] == [4, 4]
    assert (tmp_path / "checkpoints" / "damaged-step-8").exists()
    state = json.loads((tmp_path / "checkpoints" / "step-4" / "state.json").read_text())
    assert len(state["parts"]) == 2


def test_rows_that_nobody_wrote_are_noticed(tmp_path):
    run(2, save, tmp_path, {"data": 2}, {})
    path = tmp_path / "checkpoints" / "step-8" / "state.json"
    state = json.loads(path.read_text())
    del state["parts"]["tensors-00001-of-00002.safetensors"]
    path.write_text(json.dumps(state))
    # The first process misses nothing of its own, and goes back with the other.
    found = run(2, resume, tmp_path, {"data": 2}, {}, 4)
    assert [step for step, _ in found] == [4, 4]
    assert (tmp_path / "checkpoints" / "damaged-step-8").exists()
    (tmp_path / "checkpoints" / "damaged-step-8").rename(tmp_path / "checkpoints" / "step-8")
    assert resume(0, tmp_path, {}, {}, 4)[0] == 4


def unreadable(rank, folder):
    mesh = build_mesh(ParallelSection(data=2))
    store = store_of(mesh, folder, trainer_of(mesh))
    if rank == 1:
        sharded_checkpoints.read_parts = lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error", "a file"))
    with pytest.raises(UserError) as raised:
        store.load_latest()
    return str(raised.value)


def test_all_stop_where_one_cannot_read(tmp_path):
    run(2, save, tmp_path, {"data": 2}, {})
    first, second = run(2, unreadable, tmp_path)
    assert "rank 1" in first
    assert "a file" in second
    assert (tmp_path / "checkpoints" / "step-8").exists()


def fail(rank, folder):
    mesh = build_mesh(ParallelSection(data=2))
    trainer = trainer_of(mesh)
    store = store_of(mesh, folder, trainer)
    tensors = trainer.own_tensors()
    if rank == 1:
        tensors = {n: t * float("nan") if t.is_floating_point() else t for n, t in tensors.items()}
    with pytest.raises(UserError) as raised:
        store.save(1, tensors, {})
    return str(raised.value)


def test_all_stop_where_one_cannot_save(tmp_path):
    first, second = run(2, fail, tmp_path)
    assert "rank 1" in first
    assert "not finite" in second
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def export(rank, folder):
    mesh = build_mesh(ParallelSection(**FOUR))
    save_parts(trainer_of(mesh).model, folder / "model", None, mesh)


def test_the_export_is_one_model(tmp_path):
    run(4, export, tmp_path)
    ours, whole_model = load_model(tmp_path / "model"), trainer_of(single()).model
    for name, weight in whole_model.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name], weight)
    assert ours.config == CONFIG
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 2  # two ranks hold what the others hold too
