import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helpers.processes import run
from helpers.training import CONFIG, T, part, rows_of
from rorqual.checkpoint.safetensors_io import write_shard
from rorqual.model import Transformer
from rorqual.model.transformer import Block
from rorqual.parallel.mesh import build_mesh
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.sections import ParallelSection
from rorqual.train.traffic_report import traffic
from rorqual.train.trainer import Trainer


def on_ranks(rank, sharding):
    """Two steps of two micro-batches in BF16, with an average, → what they gave and what is kept."""
    mesh = build_mesh(ParallelSection(data=2, sharding=sharding))
    torch.manual_seed(0)
    section = OptimizerSection(lr=3e-3)
    trainer = Trainer(
        Transformer(CONFIG), section, ScheduleSection(name="constant", warmup=0), MTPSection(), BalanceSection(),
        dtype="bfloat16", ema=0.9, mesh=mesh,
    )  # fmt: skip
    halves = [slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)]
    losses = [trainer.step([part(rows_of(step, 8), rows) for rows in halves], 0.1).loss for step in range(2)]
    bits = trainer.bits_per_byte([(rows_of(9, 2), 24), (rows_of(10, 2), 24)])
    layers = [module for module in trainer.model.modules() if isinstance(module, Block)]
    kept = sum(p.untyped_storage().nbytes() for layer in layers for p in layer.parameters())
    sent = traffic(trainer, 8 * T, 2)["bytes_a_step"]
    with trainer.optimizer.whole_weights(), tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "weights.safetensors", trainer.model.state_dict())  # must let them be freed
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return losses, bits, kept, weights, asdict(trainer.optimizer.state_bytes()), sent


def test_the_same_numbers_as_zero_1_with_less_memory():
    expected, found = run(2, on_ranks, "zero-1"), run(2, on_ranks, "full")
    for (losses, bits, whole, weights, state, _), ours in zip(expected, found, strict=True):
        assert ours[0] == pytest.approx(losses, rel=2e-3)  # each micro-batch's gradient is summed over ranks first
        assert ours[1] == pytest.approx(bits, rel=2e-3)
        assert whole > 0
        assert ours[2] == 0
        for name, w in weights.items():
            assert (ours[3][name] - w).float().norm() <= 0.02 * w.float().norm(), name
        assert ours[4]["gradients"] < 0.6 * state["gradients"]
        assert all(ours[4][kind] == state[kind] for kind in ("masters", "moments"))
    assert all(torch.equal(found[0][3][name], w) for name, w in found[1][3].items())
    for name in ("gradients, within a node", "weights, within a node"):
        before, now = expected[0][5][name], found[0][5][name]
        assert before["counted"] == before["computed"]
        assert now["counted"] == now["computed"] > 1.5 * before["counted"]
