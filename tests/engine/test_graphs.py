"""A recorded step of the GPU does what the same step does kernel by kernel."""

import pytest
import torch
from tiny import GROUPED, LATENT

from rorqual.engine.blocks import BLOCK
from rorqual.engine.cache import BlockCache
from rorqual.engine.forward import Forward, Lanes
from rorqual.model import Transformer

LONG = 40 * BLOCK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("config", [GROUPED, LATENT, LATENT.replace(n_routed_experts=None)], ids=["gqa", "moe", "mla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_recorded_steps_say_what_others_do(config, dtype):
    torch.manual_seed(3)
    device = torch.device("cuda")
    model = Transformer(config.replace(max_position_embeddings=LONG)).eval().to(device, dtype)
    cache = BlockCache(config, 300, dtype, device)
    for store in (s for layer in cache.layers for s in layer):
        store.normal_()
    forward = Forward(model, cache)
    if config.n_routed_experts and dtype is torch.float32:
        assert forward.graphs is None, "the experts' products would wait for their ends"
        return
    graphs, generator = forward.graphs, torch.Generator().manual_seed(1)
    for n, longest in ((1, 100), (1, LONG), (3, 100), (1, 50), (70, 40), (65, 60), (4, 10)):
        tables = 1 + torch.randperm(299, generator=generator).to(torch.int32)[: n * 4].view(n, 4)
        if n < 7:
            tables = 1 + torch.randperm(299, generator=generator).to(torch.int32)[: n * 40].view(n, 40)
        places = torch.randint(0, longest, (n,), generator=generator)
        places[0] = longest - 1
        lanes = Lanes(torch.randint(0, 60, (n,), generator=generator), places, tables)
        forward.graphs = graphs
        found = [x.clone() for x in forward(lanes, [])]
        forward.graphs = None
        tolerance = 1e-4 if dtype is torch.float32 else 5e-2
        for ours, plain in zip(found, forward(lanes, []), strict=True):
            assert ours.shape == plain.shape
            # Products of other shapes round otherwise, and a router may choose another expert then.
            assert torch.isclose(ours, plain, rtol=tolerance, atol=tolerance).float().mean() > 0.97 or not ours.numel()
    assert sorted(graphs.recordings) == [(1, 16), (1, 64), (4, 16), (128, 16)]
