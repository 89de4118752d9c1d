"""Fifty steps with the same data, weights and AdamW as a transformers loop give the same losses."""

import pytest
import torch

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import split

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "initializer_range": 0.05,
}
STEPS, LR, DECAY = 50, 2e-3, 0.1


def batches():
    """Every second token repeats the one before it, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(0, 257, (4, 33), generator=generator)
        tokens[:, 1::2] = tokens[:, ::2][:, :16]
        yield tokens


@pytest.mark.parametrize("micro_batch", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_losses_equal_those_of_transformers(tmp_path, micro_batch):
    from transformers import DeepseekV3ForCausalLM

    torch.set_num_threads(1)
    set_seed(0)
    ours = Transformer(ModelConfig(**CONFIG))
    save_model(ours, tmp_path / "model")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).train()
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    trainer = Trainer(ours, OptimizerSection(lr=LR, weight_decay=DECAY), ScheduleSection(name="constant", warmup=0))
    positions = torch.arange(32).expand(4, 32)
    difference, losses = 0.0, []
    for step, tokens in enumerate(batches()):
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, 32), positions, None)
        losses.append(trainer.step(split(batch, micro_batch), step / STEPS).loss)
        logits = theirs(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        difference = max(difference, abs(losses[-1] - loss.item()))
    assert losses[-1] < losses[0] - 0.3  # it learned
    assert difference < 1e-3
