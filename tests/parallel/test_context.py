import pytest
import torch

from helpers.processes import run
from helpers.training import CONFIG
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.parallel.context import KEYS, part, share_sequences
from rorqual.parallel.mesh import build_mesh
from rorqual.sections import ParallelSection

T, ROWS = 24, 2
GROUPED = ModelConfig.from_dict({
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
})  # fmt: skip


def model_of(latent):
    torch.manual_seed(0)
    return Transformer(CONFIG if latent else GROUPED)


def batch_of(isolated):
    tokens = torch.randint(0, 40, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(T) // 7).expand(ROWS, T).contiguous()
    positions = torch.arange(T).expand(ROWS, T).contiguous()
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(ROWS, T), positions, documents if isolated else None)


def losses(model, batch):
    """A number for each token, that depends on the place in the sequence only by the token's own position."""
    hidden = model(batch.inputs, batch.positions, batch.attention_mask)
    return (hidden * (batch.positions + 1.0)[..., None].cos()).sum(-1)


def on_ranks(rank, size, latent, isolated):
    mesh, model = build_mesh(ParallelSection(context=size)), model_of(latent)
    share_sequences(model, mesh.context)
    own = part(batch_of(isolated), mesh.context)
    found = losses(model, own)
    found.sum().backward()
    sent = {what: n for (what, _), n in mesh.traffic.sent.items()}
    return own.index, found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sent


@pytest.mark.parametrize(("size", "latent", "isolated"), [(2, True, False), (3, True, True), (2, False, False)])
def test_each_rank_computes_its_tokens_as_one_process_does(size, latent, isolated):
    found = run(size, on_ranks, size, latent, isolated)
    alone, batch = model_of(latent), batch_of(isolated)
    expected = losses(alone, batch)
    expected.sum().backward()
    assert sorted(torch.cat([index for index, *_ in found]).tolist()) == list(range(T))
    for index, ours, _, _ in found:
        torch.testing.assert_close(ours, expected[:, index].detach(), rtol=1e-4, atol=1e-5)
    for name, p in alone.named_parameters():
        if p.grad is not None:
            total = sum(gradients[name] for _, _, gradients, _ in found)
            assert (total - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    layers, width = (4, 16 + 4) if latent else (2, 2 * 2 * 8)  # latent and rotated key, or keys and values of 2 heads
    once = layers * (size - 1) * ROWS * T // size * width * 4
    for _, _, _, sent in found:
        assert sent == {KEYS: once, f"gradients of {KEYS}": once}
