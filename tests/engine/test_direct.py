"""The short way through a decode step says what the network says."""

import pytest
import torch
from tiny import GROUPED, LATENT

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.blocks import BLOCK
from rorqual.engine.cache import BlockCache, Prompt, Step
from rorqual.engine.direct import direct_step
from rorqual.kernels import cpu
from rorqual.model import Transformer
from rorqual.precision.lowbit import convert

pytestmark = pytest.mark.skipif(cpu.capability() is None, reason="no compiled functions here")
SHAPES = {
    "grouped": GROUPED.replace(hidden_size=64, intermediate_size=96),
    "biases": GROUPED.replace(
        model_type="qwen2", hidden_size=96, tie_word_embeddings=True, head_dim=32, attention_bias=True
    ),
    "interleaved": GROUPED.replace(rope_interleave=True, num_key_value_heads=4),
    "wide": GROUPED.replace(hidden_size=64, head_dim=64),
    "odd": GROUPED.replace(hidden_size=40, intermediate_size=50, num_attention_heads=5, num_key_value_heads=1),
}


def packed(config, bits="int4", dtype=torch.float32):
    torch.manual_seed(3)
    model = Transformer(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return convert(model.to(dtype), bits)


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_the_networks(shape, bits, rows, dtype):
    model = packed(SHAPES[shape], bits, dtype)
    lengths = [(7 * i) % 33 + 1 for i in range(rows)]
    cache = BlockCache(model.config, 3 * rows + 1, dtype, torch.device("cpu"))
    step = direct_step(model, cache)
    tables = torch.arange(1, 3 * rows + 1, dtype=torch.int32).view(rows, 3)
    sequences = [torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    before = [Prompt(0, n - 1, tables[i].tolist()) for i, n in enumerate(lengths) if n > 1]
    if before:
        everything = torch.cat([s[:-1] for s in sequences]).unsqueeze(0)
        first = Step(cache, tables[:0], torch.zeros(0, dtype=torch.long), before)
        model(everything, first.positions, cache=first)
    ours = step(torch.stack([s[-1] for s in sequences]), tables, torch.tensor(lengths, dtype=torch.int32))
    assert max(lengths) <= BLOCK * 3
    for row, sequence in zip(ours, sequences, strict=True):
        theirs = model.logits(sequence.unsqueeze(0))[0, -1].float()
        # Where an activation is rounded the other way, what follows differs by a percent or two in so small a network.
        assert float((row - theirs).norm() / theirs.norm()) < 0.05


def test_greedy_answers_do_not_depend_on_company():
    model = packed(SHAPES["grouped"])
    prompts = [[(5 * i + j) % 59 + 1 for j in range(1 + i % 20)] for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=15)
    together = Engine(model, slots=32).generate(prompts, params)
    few = Engine(model, slots=3, cache_bytes=1 << 16, prefix_cache=True, chunk=5).generate(prompts, params)
    alone = [Engine(model).generate([p], params)[0] for p in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in few]


def test_networks_without_a_short_way_go_the_long_one():
    model = packed(LATENT)
    assert direct_step(model, BlockCache(model.config, 2, torch.float32, torch.device("cpu"))) is None
    assert len(Engine(model).generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))[0].tokens) == 5
