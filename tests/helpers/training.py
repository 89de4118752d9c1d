"""A small model of every kind of layer, and what it trains on."""

from contextlib import contextmanager

import pytest
import torch

from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.train.trainer import Trainer

T = 12
CONFIG = ModelConfig.from_dict({
    "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.1,
    "n_group": 4, "topk_group": 2,
})  # fmt: skip


def rows_of(step, rows):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (rows, T + 1), generator=generator)
    weights = (torch.rand(rows, T, generator=generator) > 0.2).float()
    documents = (torch.arange(T) >= T // 2).long().expand(rows, T).contiguous()
    positions = (torch.arange(T) % (T // 2)).expand(rows, T).contiguous()
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, documents)


def part(batch, rows):
    return Batch(*(t[rows] for t in (batch.inputs, batch.targets, batch.weights, batch.positions, batch.documents)))


def trainer_of(mesh=None, micro_batches=1, recompute="none", trainer=None, **options):
    """trainer: more arguments of Trainer; options: fields of its optimizer."""
    torch.manual_seed(0)
    options = {"clip": 0.5} | options
    section = OptimizerSection(lr=3e-3, eps=1e-4, **options)
    return Trainer(
        Transformer(CONFIG), section, ScheduleSection(name="constant", warmup=0), MTPSection(), BalanceSection(),
        recompute=recompute, mesh=mesh, micro_batches=micro_batches, **{"dtype": "float32"} | (trainer or {}),
    )  # fmt: skip


def whole(ranks, key):
    """Weights of the model from those of the ranks of an expert group, in every stage."""
    out = {}
    for name in {name for rank in ranks for name in rank[key]}:
        parts = [rank[key][name] for rank in ranks if name in rank[key]]
        out[name] = torch.cat(parts) if ".mlp.experts." in name else parts[0]
    return out


@contextmanager
def stopped_after(steps):
    """The block's run fails once it has done as many steps."""
    step = Trainer.step

    def failing(self, *arguments):
        if self.steps == steps:
            raise RuntimeError("stopped here")
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(RuntimeError, match="stopped here"):
            yield
