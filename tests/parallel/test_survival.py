"""A process that dies, hangs or computes nonsense."""

import time

import pytest
import torch

from helpers.processes import run
from helpers.training import part, rows_of, trainer_of
from rorqual.parallel.group import CommunicationError
from rorqual.parallel.mesh import build_mesh
from rorqual.sections import ParallelSection
from rorqual.train.ranks import far_off

ROWS = 4


def left_alone(rank, dies, told):
    """Rank 1 stops after two steps: what rank 0 is told in the third, after which the file `told` is there."""
    mesh = build_mesh(ParallelSection(data=2, experts=2, timeout=3.0))
    trainer = trainer_of(mesh)
    for step in range(3):
        if rank and step == 2:
            if dies:
                torch.distributed.destroy_process_group()
            while not (dies or told.exists()):
                time.sleep(0.05)
            return None
        try:
            trainer.step([part(rows_of(step, ROWS), slice(2 * rank, 2 * rank + 2))], 0.5)
        except CommunicationError as e:
            told.touch()
            return str(e)
    return "no error"


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "hung"])
def test_what_hangs_is_named(dies, tmp_path):
    said, _ = run(2, left_alone, dies, tmp_path / "told")
    assert "rank 0, step 3: " in said
    assert "among ranks 0, 1" in said


def with_nonsense(rank):
    mesh = build_mesh(ParallelSection(data=2))
    trainer = trainer_of(mesh)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    if rank:
        trainer.model.model.norm.weight.data[3] = float("nan")
    found = trainer.step([part(rows_of(0, ROWS), slice(2 * rank, 2 * rank + 2))], 0.5)
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)]
    return found.skipped, found.ranks_not_finite, changed


def test_a_rank_whose_loss_is_not_finite_is_named():
    found = run(2, with_nonsense)
    assert found == [(True, (1,), []), (True, (1,), ["model.norm.weight"])]


def with_a_gradient_of_nonsense(rank):
    trainer = trainer_of(build_mesh(ParallelSection(data=2)))
    if rank:
        trainer.model.model.norm.weight.register_hook(lambda g: g * float("nan"))
    found = trainer.step([part(rows_of(0, ROWS), slice(2 * rank, 2 * rank + 2))], 0.5)
    return found.skipped, found.grad_norm is None, found.ranks_not_finite


def test_a_rank_whose_gradient_is_not_finite_is_named():
    assert run(2, with_a_gradient_of_nonsense) == [(True, False, (1,))] * 2


def with_wrong_weights(rank):
    trainer = trainer_of(build_mesh(ParallelSection(data=3)))
    before = trainer.step([part(rows_of(0, 6), slice(2 * rank, 2 * rank + 2))], 0.5)
    if rank == 1:
        trainer.model.lm_head.weight.data *= 100
    after = trainer.step([part(rows_of(1, 6), slice(2 * rank, 2 * rank + 2))], 0.5)
    few = part(rows_of(2, 6), slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        few.weights[:, 2:] = 0
    reports = before.ranks[1], trainer.step([few], 0.5).ranks[0]
    return far_off(before.ranks), far_off(after.ranks), [(own.loss, own.grad_norm) for own in reports]


def test_a_rank_that_is_far_off_is_named():
    found = run(3, with_wrong_weights)
    assert found[0] == found[1] == found[2]
    before, after, (report, few) = found[0]
    assert few == (0, 0)  # not compared
    assert not before
    assert list(after) == [1]
    assert "rank 1 alone has a loss of " in after[1]
    # What the rank has said is what it would find alone, with no other rank.
    alone = trainer_of(clip=1e9).step([part(rows_of(0, 6), slice(2, 4))], 0.5)
    assert report[0] == pytest.approx(alone.loss, rel=1e-5)
    assert report[1] == pytest.approx(alone.grad_norm, rel=1e-2)  # ranks differ in their tokens of multi-token losses
