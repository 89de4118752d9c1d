"""What a stage keeps of a model."""

from dataclasses import replace

import pytest
import torch

from helpers.small_configs import LATENT
from rorqual.model import Transformer
from rorqual.parallel.stages import keep, looked_up


@pytest.mark.parametrize("tied", [False, True])
def test_stages_share_out_the_parameters(tied):
    """Under their names; a tied embedding is in the first and the last."""
    config = replace(LATENT, num_nextn_predict_layers=1, tie_word_embeddings=tied)
    whole = dict(Transformer(config).named_parameters())
    found = []
    for layers, first, last in ((range(2), True, False), (range(2, 3), False, True)):
        model = Transformer(config)
        keep(model, layers, first, last)
        found.append({name: p.shape for name, p in model.named_parameters()})
        assert len(model.moe_layers()) == (1 if first else 2)
    assert found[0] | found[1] == {name: p.shape for name, p in whole.items()}
    assert found[0].keys() & found[1].keys() == ({"model.embed_tokens.weight"} if tied else set())
    assert "model.layers.3.eh_proj.weight" in found[1]


def test_look_ups():
    embedding, rows = torch.nn.Embedding(3, 2), torch.ones(2, 4, 2)
    with looked_up(embedding, rows.unbind()):
        assert torch.equal(embedding(torch.tensor([0])), rows[0])
    assert torch.equal(embedding(torch.tensor([0])), embedding.weight[:1])
