"""Training by several processes against one that accumulates over the same micro-batches."""

import pytest
import torch

from helpers.processes import run
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.parallel.mesh import build_mesh
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.sections import ParallelSection
from rorqual.train.trainer import Trainer

STEPS, ROWS, T = 20, 8, 12  # rows of a step
CONFIG = ModelConfig.from_dict({
    "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.1,
    "n_group": 4, "topk_group": 2,
})  # fmt: skip


def rows_of(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (ROWS, T + 1), generator=generator)
    weights = (torch.rand(ROWS, T, generator=generator) > 0.2).float()
    documents = (torch.arange(T) >= T // 2).long().expand(ROWS, T).contiguous()
    positions = (torch.arange(T) % (T // 2)).expand(ROWS, T).contiguous()
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, documents)


def part(batch, rows):
    return Batch(*(t[rows] for t in (batch.inputs, batch.targets, batch.weights, batch.positions, batch.documents)))


def trainer_of(mesh=None, **options):
    torch.manual_seed(0)
    options = {"clip": 0.5} | options
    section = OptimizerSection(lr=3e-3, eps=1e-4, **options)
    return Trainer(
        Transformer(CONFIG), section, ScheduleSection(name="constant", warmup=0), MTPSection(), BalanceSection(),
        dtype="float32", mesh=mesh,
    )  # fmt: skip


def train(trainer, micro_batches_of, steps=STEPS):
    return [trainer.step(micro_batches_of(rows_of(step)), step / steps) for step in range(steps)]


def on_ranks(rank, layout, options, micro):
    mesh = build_mesh(ParallelSection(**layout))
    trainer = trainer_of(mesh, **options)
    size = ROWS // mesh.data.size
    own = [slice(i, i + micro) for i in range(size * mesh.data.place, size * (mesh.data.place + 1), micro)]
    steps = train(trainer, lambda batch: [part(batch, rows) for rows in own])
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    biases = [m.gate.e_score_correction_bias.clone() for m in trainer.model.moe_layers()]
    return [m.to_dict() for m in steps], weights, biases, mesh.experts.place, trainer.optimizer.state_bytes().moments


def whole(found):
    """Weights of the model from those of the ranks of an expert group."""
    out = {}
    for name in found[0][1]:
        parts = [f[1][name] for f in found]
        out[name] = torch.cat(parts) if ".mlp.experts." in name else parts[0]
    return out


MUON = {"name": "muon"}
LAYOUTS = [
    ({"data": 2}, 4, {}),
    ({"data": 8}, 1, {}),
    ({"data": 4}, 2, MUON),
    ({"data": 2, "experts": 2}, 4, {}),
    ({"data": 4, "experts": 2}, 2, MUON),
    ({"data": 4, "experts": 4, "ranks_per_node": 2}, 2, {}),
    ({"data": 4, "experts": 4, "ranks_per_node": 2, "dispatch": "all-to-all"}, 1, {}),
    ({"data": 8, "experts": 8, "ranks_per_node": 4, "overlap": False}, 1, MUON),
]


@pytest.mark.parametrize(("layout", "micro", "options"), LAYOUTS)
def test_losses_and_weights_equal_one_process(layout, micro, options):
    found = run(layout["data"], on_ranks, layout, options, micro)
    alone = trainer_of(**options)
    expected = train(alone, lambda batch: [part(batch, slice(i, i + micro)) for i in range(0, ROWS, micro)])
    experts = layout.get("experts", 1)
    ours = whole(found[:experts])
    theirs = dict(alone.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for metrics, right in zip(found[0][0], expected, strict=True):
        assert metrics["loss"] == pytest.approx(right.loss, rel=1e-5)
        assert metrics["mtp_loss"] == pytest.approx(right.mtp_loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(right.grad_norm, rel=1e-4)
        assert metrics["max_vio_per_layer"] == pytest.approx(right.max_vio_per_layer)
    exact = experts == 1 and micro * layout["data"] == ROWS  # gradients are added in the same order
    for name, weight in theirs.items():
        if exact:
            assert torch.equal(ours[name], weight), name
        assert (ours[name] - weight).norm() <= 1e-5 * weight.norm(), name
    for bias, module in zip(found[0][2], alone.model.moe_layers(), strict=True):
        assert torch.equal(bias, module.gate.e_score_correction_bias)
    for rank in found[1:]:  # replicas have the same bits
        if rank[3] == found[0][3]:
            assert all(torch.equal(found[0][1][name], w) for name, w in rank[1].items())
    moments = sum(rank[4] for rank in found)  # each is kept once
    assert moments == alone.optimizer.state_bytes().moments
