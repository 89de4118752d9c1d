"""A process that dies, hangs or computes nonsense."""

import time

import pytest
import torch

from helpers.processes import run
from helpers.training import part, rows_of, trainer_of
from rorqual.parallel.group import CommunicationError
from rorqual.parallel.mesh import build_mesh
from rorqual.sections import ParallelSection

ROWS = 4


def left_alone(rank, dies):
    """Rank 1 stops after two steps: what rank 0 is told in the third."""
    mesh = build_mesh(ParallelSection(data=2, experts=2, timeout=3.0))
    trainer = trainer_of(mesh)
    for step in range(3):
        if rank and step == 2:
            if dies:
                torch.distributed.destroy_process_group()
            else:
                time.sleep(10)
            return None
        try:
            trainer.step([part(rows_of(step, ROWS), slice(2 * rank, 2 * rank + 2))], 0.5)
        except CommunicationError as e:
            return str(e)
    return "no error"


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "hung"])
def test_what_hangs_is_named(dies):
    said, _ = run(2, left_alone, dies)
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
