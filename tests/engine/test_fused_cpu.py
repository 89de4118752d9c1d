"""The short way through a decode step says what the network says."""

import functools
from statistics import median

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.block_manager import BLOCK
from rorqual.engine.fused_cpu import fused_decode_step, fused_mtp_step
from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache, PrefillSlice, token_shapes
from rorqual.kernels import cpu, kv_fp8, kv_int8, quantized_linear
from rorqual.kernels.linear import linear
from rorqual.model import Transformer
from rorqual.precision.quantize import convert, round_int8

pytestmark = pytest.mark.skipif(cpu.capability() is None, reason="no compiled functions here")
SHAPES = {
    "grouped": GROUPED.replace(hidden_size=64, intermediate_size=96),
    "biases": GROUPED.replace(
        model_type="qwen2", hidden_size=96, tie_word_embeddings=True, head_dim=32, attention_bias=True
    ),
    "interleaved": GROUPED.replace(rope_interleave=True, num_key_value_heads=4),
    "wide": GROUPED.replace(hidden_size=64, head_dim=64),
    "latent": LATENT,
    "queries of low rank": LATENT.replace(hidden_size=64, q_lora_rank=24, kv_lora_rank=32, rope_interleave=False),
    "groups of experts": LATENT.replace(
        hidden_size=64,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=40,
        routed_scaling_factor=2.5,
    ),
    "softmax": LATENT.replace(
        model_type="deepseek_v2",
        n_routed_experts=20,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        n_group=5,
        topk_group=3,
        norm_topk_prob=False,
        n_shared_experts=0,
        attention_bias=True,
    ),
    "shared by many": GROUPED.replace(num_attention_heads=26, num_key_value_heads=1, head_dim=48),
    "odd": GROUPED.replace(hidden_size=40, intermediate_size=50, num_attention_heads=5, num_key_value_heads=1),
}


def packed(config, bits="int4", dtype=torch.float32):
    torch.manual_seed(3)
    model = Transformer(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return convert(model.bfloat16().to(dtype), bits)  # the same weights, whatever it computes in


@functools.cache  # for tests that change no weights
def shared(shape, bits="int4", dtype=torch.float32):
    return packed(SHAPES[shape], bits, dtype)


@functools.cache
def exact_logits(shape, bits, i):
    """The network's answer to sequence i, in FP32."""
    return last_logits(shared(shape, bits), sequence(i))


def sequence(i):
    return random_tokens((7 * i) % 33 + 1, i)


def random_tokens(count, seed):
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed))


# Every shape has each of both in what is not slow, if not with one another.
PACKINGS = [
    pytest.param(bits, rows, dtype, marks=() if (rows, dtype) in quick else pytest.mark.slow)
    for bits, quick in (
        ("int4", {(1, torch.float32), (5, torch.float32), (70, torch.bfloat16)}),
        ("int8", {(2, torch.float32), (70, torch.float32)}),
    )
    for rows, dtype in [*((rows, torch.float32) for rows in (1, 2, 5, 70)), (70, torch.bfloat16)]
]


@pytest.mark.parametrize(("bits", "rows", "dtype"), PACKINGS, ids=str)  # fastest, so that a network is made once
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_the_networks(shape, bits, rows, dtype):
    model, head = shared(shape, bits, dtype), shared(shape, bits).head_weight
    errors, own_errors = [], []
    cache = PagedKVCache(model.config, 3 * rows + 1, dtype, torch.device("cpu"))
    step = fused_decode_step(model, cache)
    tables = torch.arange(1, 3 * rows + 1, dtype=torch.int32).view(rows, 3)
    for start in range(0, max(24, rows), rows):  # enough sequences for a median, `rows` of them at a time
        which = range(start, start + rows)
        sequences = [sequence(i) for i in which]
        exact = [exact_logits(shape, bits, i) for i in which]
        before = [PrefillSlice(0, len(s) - 1, tables[i].tolist()) for i, s in enumerate(sequences) if len(s) > 1]
        if before:
            everything = torch.cat([s[:-1] for s in sequences]).unsqueeze(0)
            first = KVCacheView(cache, tables[:0], torch.zeros(0, dtype=torch.long), before)
            model(everything, first.positions, cache=first)
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int32)
        assert lengths.max() <= BLOCK * 3
        ours, hidden = step(torch.stack([s[-1] for s in sequences]), tables, lengths)
        assert torch.allclose(linear(hidden, head), ours, rtol=1e-4, atol=1e-4)
        errors += errors_of(ours, exact)
        if dtype != torch.float32:
            own_errors += errors_of([last_logits(model, s) for s in sequences], exact)
    if dtype == torch.float32:
        # Where an activation is rounded the other way, what follows differs by a percent or so in so small a network; a
        # router may then choose another expert.
        assert median(errors) < 1e-4
        assert sum(e > 0.2 for e in errors) <= (len(errors) / 20 if model.moe_layers() else 0)
    else:  # it keeps more digits between its products than the network does; a router may choose another expert in both
        assert median(errors) < 1.2 * median(own_errors)


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("shape", ["grouped", "latent", "groups of experts"])
@torch.no_grad()
def test_a_multi_token_module_says_what_it_says(shape, rows):
    model = packed(SHAPES[shape].replace(num_nextn_predict_layers=1), "int8")
    places = [i % 3 for i in range(rows)]
    caches = [PagedKVCache(model.config, rows + 1, torch.float32, torch.device("cpu"), 1) for _ in range(2)]
    tables = torch.arange(1, rows + 1, dtype=torch.int32).view(rows, 1)
    compiled = fused_mtp_step(model, caches[0])
    for place in range(3):
        at = torch.tensor([r for r in range(rows) if places[r] >= place])
        if not len(at):
            break
        states, following = torch.randn(len(at), model.config.hidden_size), at % 50 + place
        where = torch.full((len(at),), place)
        wanted = torch.arange(0, len(at), 2, dtype=torch.int32)
        ours, hidden = compiled(following, tables[at], (where + 1).to(torch.int32), wanted, states)
        step = KVCacheView(caches[1], tables[at], where, [])
        theirs = model.mtp_forward(states.unsqueeze(0), following.unsqueeze(0), step.positions, step)[0]
        errors = (hidden - theirs).norm(dim=1) / theirs.norm(dim=1)
        assert errors.median() < 1e-3, "the rest are activations rounded the other way, and other experts chosen"
        assert torch.allclose(ours, linear(hidden[wanted], model.head_weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["grouped", "latent"])
@torch.no_grad()
def test_several_tokens_of_a_sequence_at_once(shape):
    model = shared(shape)
    sequence = torch.randint(0, 60, (20,), generator=torch.Generator().manual_seed(1))
    cache = PagedKVCache(model.config, 3, torch.float32, torch.device("cpu"))
    step, table = fused_decode_step(model, cache), torch.tensor([[1, 2]], dtype=torch.int32)
    one_by_one = [step(sequence[i : i + 1], table, torch.tensor([i + 1], dtype=torch.int32))[0] for i in range(20)]
    again = PagedKVCache(model.config, 3, torch.float32, torch.device("cpu"))
    step = fused_decode_step(model, again)
    for first, count in ((0, 1), (1, 4), (5, 12), (17, 3)):
        lengths = torch.arange(first + 1, first + count + 1, dtype=torch.int32)
        logits, _ = step(sequence[first : first + count], table.expand(count, 2).contiguous(), lengths)
        assert torch.allclose(logits, torch.cat(one_by_one[first : first + count]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["grouped", "groups of experts"])
@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_threads_say_the_same_together(shape, rows):
    model = shared(shape)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            cache = PagedKVCache(model.config, rows + 1, torch.float32, torch.device("cpu"))
            tables = torch.arange(1, rows + 1, dtype=torch.int32).view(rows, 1)
            step = fused_decode_step(model, cache)
            for place in range(1, 9):
                tokens = torch.arange(rows) * 5 + place
                logits, _ = step(tokens, tables, torch.full((rows,), place, dtype=torch.int32))
            found.append(logits)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_formats_whose_activations_differ_are_refused():
    model = packed(SHAPES["grouped"], "int4", torch.float32)
    down = model.model.layers[0].mlp.down_proj
    down.weight = round_int8(quantized_linear.dequantize(down.weight)[None])
    cache = PagedKVCache(model.config, 2, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="int4, int8"):
        fused_decode_step(model, cache)


def test_all_packed_weights_are_put_into_large_pages(monkeypatch):
    asked = []
    monkeypatch.setattr("rorqual.engine.fused_cpu.use_huge_pages", asked.extend)
    model = packed(SHAPES["grouped"], "int4", torch.float32)
    fused_decode_step(model, PagedKVCache(model.config, 2, torch.float32, torch.device("cpu")))
    mlp = model.model.layers[0].mlp
    wanted = [model.head_weight, *(m.weight for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))]
    assert {w.data.data_ptr() for w in wanted} <= {t.data_ptr() for t in asked}


def last_logits(model, sequence):
    return model.logits(sequence.unsqueeze(0))[0, -1].float()


def errors_of(logits, exact):
    """Each row's distance from the network in FP32, relative."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(logits, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["grouped", "biases", "interleaved", "wide", "odd", "shared by many"])
@torch.no_grad()
def test_a_cache_of_8_bits_keeps_and_says_what_the_reference_does(shape, dtype):
    model = shared(shape, "int8", dtype)
    sequences = [random_tokens(n, n) for n in (1, 15, 16, 17, 33, 40, 3, 26)]
    rows, own, errors = len(sequences), [], []
    caches = [PagedKVCache(model.config, 3 * rows + 1, torch.int8, torch.device("cpu")) for _ in range(2)]
    tables = torch.arange(1, 3 * rows + 1, dtype=torch.int32).view(rows, 3)
    compiled = fused_decode_step(model, caches[0])
    for table, sequence in zip(tables, sequences, strict=True):
        n = len(sequence)
        half = n // 2  # in two pieces, the second of which reads what the first left
        for first, end in ((0, half), (half, n)):
            if first == end:
                continue
            lengths = torch.arange(first + 1, end + 1, dtype=torch.int32)
            some = table.repeat(end - first, 1)
            ours = compiled(sequence[first:end], some, lengths)[0][-1]
            step = KVCacheView(
                caches[1], tables[:0], lengths[:0].long(), [PrefillSlice(first, end - first, table.tolist())]
            )
            hidden = model(sequence[None, first:end], step.positions, cache=step)[0]
        theirs, exact = linear(hidden[-1:], model.head_weight)[0].float(), last_logits(model, sequence)
        errors.append(float((ours - theirs).norm() / exact.norm()))
        own.append(float((theirs - exact).norm() / exact.norm()))
    width = model.config.head_dim
    for i, unpack in enumerate((kv_int8.dequantize_keys, kv_int8.dequantize_values)):
        ours, theirs = (unpack(cache.layers[0][i], width) for cache in caches)
        assert (ours - theirs).abs().max() <= 2.1 * theirs.abs().max() / 127, "one step, where rounded the other way"
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
    # The compiled step rounds queries too; the reference's own error is that of the keys, the values and the dtype.
    # With a matrix unit, both are smaller, the latter more.
    assert median(errors) < (2.2 if cpu.has_matrix_unit() else 1.8) * median(own)
    assert max(errors) < 0.12


FP8_SHAPES = {
    "wide heads": GROUPED.replace(hidden_size=64, head_dim=160),
    "wide latents": LATENT.replace(hidden_size=64, kv_lora_rank=160),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", ["grouped", "biases", "odd", "shared by many", "latent", "queries of low rank", *FP8_SHAPES]
)
@torch.no_grad()
def test_an_fp8_cache_keeps_and_says_what_the_reference_does(shape, dtype):
    model = packed({**SHAPES, **FP8_SHAPES}[shape], "int8", dtype)
    sequences = [random_tokens(n, n) for n in (1, 15, 16, 17, 33, 40, 3, 26)]
    rows, own, errors = len(sequences), [], []
    caches = [PagedKVCache(model.config, 3 * rows + 1, torch.float8_e4m3fn, torch.device("cpu")) for _ in range(2)]
    tables = torch.arange(1, 3 * rows + 1, dtype=torch.int32).view(rows, 3)
    compiled = fused_decode_step(model, caches[0])
    for table, sequence in zip(tables, sequences, strict=True):
        for first, end in ((0, len(sequence) // 2), (len(sequence) // 2, len(sequence))):  # the second reads the first
            if first == end:
                continue
            lengths = torch.arange(first + 1, end + 1, dtype=torch.int32)
            ours = compiled(sequence[first:end], table.repeat(end - first, 1), lengths)[0][-1]
            step = KVCacheView(
                caches[1], tables[:0], lengths[:0].long(), [PrefillSlice(first, end - first, table.tolist())]
            )
            hidden = model(sequence[None, first:end], step.positions, cache=step)[0]
        theirs, exact = linear(hidden[-1:], model.head_weight)[0].float(), last_logits(model, sequence)
        errors.append(float((ours - theirs).norm() / exact.norm()))
        own.append(float((theirs - exact).norm() / exact.norm()))
    width = token_shapes(model.config)[0][-1]
    for pair in zip(*(cache.layers[0] for cache in caches), strict=True):
        rounded = pair[0].dtype is torch.uint8  # else rotated keys in BF16
        ours, theirs = (kv_fp8.dequantize(x, width) if rounded else x.float() for x in pair)
        assert (ours - theirs).norm() < (0.02 if dtype is torch.float32 else 0.04) * theirs.norm()
        if dtype is torch.float32 and rounded:  # one step, where rounded the other way: an eighth of a number
            tiles = torch.nn.functional.pad(theirs.abs(), (0, -width % 128)).unflatten(-1, (-1, 128)).amax(-1)
            least = (tiles / 448 * 2.0**-6).repeat_interleave(128, -1)[..., :width]  # that has three bits
            assert ((ours - theirs).abs() <= 0.13 * torch.maximum(theirs.abs(), least)).all()
    # In BF16 the reference rounds activations between its products too.
    assert median(errors) < (1.0 if dtype is torch.float32 else 1.5) * median(own)


@pytest.mark.parametrize("kv_cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_greedy_answers_do_not_depend_on_company(kv_cache_dtype):
    model = shared("grouped")
    prompts = [[(5 * i + j) % 59 + 1 for j in range(1 + i % 20)] for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=15)
    options = {"kv_cache_dtype": kv_cache_dtype}
    together = Engine(model, max_num_seqs=32, **options).generate(prompts, params)
    few = Engine(
        model, max_num_seqs=3, kv_cache_bytes=1 << 16, prefix_cache=True, max_prefill_tokens=5, **options
    ).generate(prompts, params)
    alone = [Engine(model, **options).generate([p], params)[0] for p in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in few]
