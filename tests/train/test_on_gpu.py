"""Training on a GPU, as far as a device that computes on the CPU shows it (helpers/simulated_gpu.py)."""

import json
import shutil

import pytest
import torch

from helpers import simulated_gpu
from helpers.processes import run
from helpers.training import part, rows_of, trainer_of
from rorqual.checkpoint.huggingface import load_model
from rorqual.parallel import context
from rorqual.parallel.mesh import build_mesh
from rorqual.recipe import PretrainRecipe, parse_recipe
from rorqual.sections import ParallelSection
from rorqual.train.training_run import pretrain, split

MUON = {"name": "muon", "muon_lr": 0.01}


def one_process(_rank, simulated, recompute, trainer, options):
    """A step of two micro-batches, in a process of its own → losses, bits per byte and weights."""
    device = simulated_gpu.install() if simulated else torch.device("cpu")
    found = trainer_of(recompute=recompute, trainer={"device": device} | trainer, **options)
    halves = [slice(0, 2), slice(2, 4)]
    losses = [found.step([part(rows_of(0, 4), rows) for rows in halves], 0.1).loss]
    bits = found.bits_per_byte([(rows_of(9, 2), 24)])
    assert {p.device for p in found.model.parameters()} == {device}
    with found.released_weights():
        weights = {n: p.detach().float().cpu().clone() for n, p in found.model.named_parameters()}
    kept = {name: t.cpu() for name, t in found.tensors().items() if name.startswith(("weights.", "ema."))}
    return losses, bits, weights, kept


def assert_alike(here, there, tolerance=1e-5):
    """tolerance: of losses, and of what differs in a tensor as a share of it."""
    for before, now in zip(here[:2], there[:2], strict=True):
        assert now == pytest.approx(before, rel=tolerance)
    for before, now in zip(here[2:], there[2:], strict=True):
        assert before.keys() == now.keys()
        for name, w in before.items():
            assert (now[name] - w).norm() <= tolerance * w.norm(), name


@pytest.mark.parametrize(
    ("recompute", "trainer", "options"),
    [
        ("full", {"ema": 0.9}, MUON),
        pytest.param(
            "v3",
            {"precision": "fp8-ue8m0", "offload": True},
            {"moments": "bfloat16", "stochastic_rounding": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("none", {"precision": "mxfp8"}, {"moments": "8bit"}, marks=pytest.mark.slow),
        pytest.param("v3", {"precision": "fp8-nvfp4"}, MUON, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_cpu(recompute, trainer, options):
    here, there = (run(1, one_process, there, recompute, trainer, options)[0] for there in (False, True))
    assert_alike(here, there, 0.01 if "precision" in trainer else 1e-5)  # other sums are rounded to another side


def several(rank, simulated, layout, micro_batches):
    """A step in which both ranks share the work → its loss and the weights here."""
    device = simulated_gpu.install() if simulated else torch.device("cpu")
    mesh = build_mesh(ParallelSection(**layout))
    found = trainer_of(mesh, micro_batches, trainer={"device": device})
    batch = rows_of(0, 4)
    if mesh.data.size > 1:
        batch = part(batch, slice(2 * rank, 2 * rank + 2))
    rows = len(batch.inputs) // micro_batches
    loss = found.step([context.part(b, mesh.context) for b in split(batch, rows)], 0.1).loss
    bits = found.bits_per_byte([(rows_of(9, 2), 24), (rows_of(10, 2), 24)])
    with found.optimizer.whole_weights():
        weights = {n: p.detach().cpu().clone() for n, p in found.model.named_parameters()}
    return [loss], bits, weights


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [
        ({"data": 2, "experts": 2, "dispatch": "two-hop-fp8", "ranks_per_node": 1}, 2),
        ({"pipeline": 2, "schedule": "dualpipev"}, 4),
        pytest.param({"data": 2, "sharding": "full"}, 1, marks=pytest.mark.slow),
        pytest.param({"context": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"data": 2, "experts": 2, "dispatch": "all-to-all"}, 1, marks=pytest.mark.slow),
    ],
)
def test_ranks_are_those_of_the_cpu(layout, micro_batches):
    here, there = (run(2, several, simulated, layout, micro_batches) for simulated in (False, True))
    for rank in range(2):
        assert_alike(here[rank], there[rank])


def whole_run(_rank, simulated, raw, resume):
    if simulated:
        simulated_gpu.install()
    pretrain(parse_recipe(raw, PretrainRecipe), resume)


def test_a_run_goes_on_where_it_was_begun_and_on_the_other_device(tmp_path, make_recipe):
    for name, simulated in (("here", False), ("there", True)):
        recipe = make_recipe(name=name, train__steps=3, train__eval_every=2, train__save_every=2)
        run(1, whole_run, simulated, recipe.model_dump(), False)
    folder = recipe.run_dir
    plan, ledger = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "ledger"))
    assert "seconds" not in plan  # known of a CPU alone
    assert plan["parameters_total"] > 0
    assert ledger["total"]["tokens"] == 3 * 4 * recipe.data.sequence_length
    here = load_model(folder.parent / "here" / "model")
    assert_same(load_model(folder / "model"), here)
    for simulated in (True, False):
        for path in (folder / "model", folder / "checkpoints" / "step-3"):
            shutil.rmtree(path)
        run(1, whole_run, simulated, recipe.model_dump(), True)
        assert_same(load_model(folder / "model"), here)


def assert_same(found, expected):
    for (name, w), (_, v) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=0, atol=1e-5, msg=name)


def refusals(_rank):
    device = simulated_gpu.install()
    there, here = torch.ones(3, device=device), torch.ones(3)
    for attempt in (lambda: there + here, lambda: there.numpy(), lambda: torch.cat([there, here])):
        try:
            attempt()
        except (RuntimeError, TypeError):
            continue
        return False
    return bool(((there + 2.0).cpu() == 3 * here).all())


def test_the_device_refuses_what_is_on_the_cpu():
    assert run(1, refusals) == [True]
