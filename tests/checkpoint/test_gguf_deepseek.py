"""deepseek2 files: the networks of V2-Lite and V3 come back, whole or packed."""

import re
import sys

import gguf
import numpy as np
import pytest
import torch

from helpers.gguf_files import KINDS, LATENT_OF_256, LLAMA, LLAMA_OF_256, QWEN2, V2_LITE, V3, network, tensors, write
from helpers.peak_memory import loading_peak
from rorqual import load_model
from rorqual.checkpoint.gguf_import import import_gguf
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.kernels.quantized_linear import QuantizedWeight, dequantize
from rorqual.model.moe import Router
from rorqual.precision.gguf_weights import load_gguf

V3_AHEAD = V3.replace(num_nextn_predict_layers=1)
LATENTS = {
    "v2-lite": V2_LITE,
    "v2": V2_LITE.replace(n_routed_experts=8, n_group=4, topk_group=2, topk_method="group_limited_greedy"),
    "v3": V3,
    "v3-ahead": V3_AHEAD,
    "v3-without-dense-layers": V3.replace(first_k_dense_replace=0),
    "without-experts": V2_LITE.replace(
        n_routed_experts=None, n_shared_experts=0, num_experts_per_tok=None, moe_intermediate_size=None,
        first_k_dense_replace=3, rope_scaling=None,
    ),
}  # fmt: skip
TOKENS = torch.arange(60).unsqueeze(0) * 4


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small take ten times as long where two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("split", [True, False], ids=["split", "joined"])
@pytest.mark.parametrize("config", LATENTS.values(), ids=LATENTS)
@torch.no_grad()
def test_network_comes_back(tmp_path, config, split):
    model = network(config)
    import_gguf(write(tmp_path / "a.gguf", model, split=split), tmp_path / "model")
    found = load_model(tmp_path / "model")
    assert found.config == config.replace(initializer_range=0.02)
    hidden = model(TOKENS)
    assert torch.equal(found(TOKENS), hidden)
    assert torch.equal(found.logits(TOKENS), model.logits(TOKENS))
    ahead = [m.mtp_hidden_states(hidden, TOKENS) for m in (model, found)]
    assert len(ahead[0]) == config.num_nextn_predict_layers
    assert all(torch.equal(a, b) for a, b in zip(*ahead, strict=True))


@pytest.mark.parametrize("config", [V2_LITE.replace(rope_scaling=None), V3], ids=["v2-lite", "v3"])
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    model = network(config)
    import_gguf(write(tmp_path / "a.gguf", model), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(theirs(TOKENS).logits, model.logits(TOKENS), atol=1e-3, rtol=1e-3)


def test_yarns_multiplier_is_a_tenth(tmp_path):
    """As in llama.cpp: [TAG_DEEPSEEK2_YARN_LOG_MUL_FIX], discussion 7416."""
    file = write(tmp_path / "a.gguf", network(V2_LITE), deepseek2__rope__scaling__yarn_log_multiplier=0.0707)
    import_gguf(file, tmp_path / "model")
    scaling = load_model(tmp_path / "model").config.rope_scaling
    assert (scaling["mscale"], scaling["mscale_all_dim"]) == (0.707, 0.707)


def test_older_files_lack_scoring_and_groups(tmp_path):
    fields = ("expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_weights_norm")
    model = network(V2_LITE)
    import_gguf(
        write(tmp_path / "a.gguf", model, **{f"deepseek2__{name}": None for name in fields}), tmp_path / "model"
    )
    assert load_model(tmp_path / "model").config == V2_LITE.replace(initializer_range=0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"deepseek2__expert_gating_func": 3}, r"expert_gating_func = 3 must be 1 \(softmax\) or 2"),
        ({"deepseek2__attention__head_count": 8}, "has shape"),
        ({"deepseek2__expert_used_count": None}, "expert_used_count is missing"),
        ({"deepseek2__expert_used_count": 7}, "only 4 experts are within the 2 groups"),
        ({"deepseek2__rope__scaling__type": "longrope"}, "'longrope' is not supported"),
        ({"deepseek2__rope__scaling__factor": None}, "scaling.factor = None must be a number"),
        ({"general__architecture": "kimi"}, "'kimi' cannot be imported; only llama, qwen2, deepseek2"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as caught:
        load_gguf(write(tmp_path / "a.gguf", network(V3), **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["blk.1.attn_v_b.weight", "blk.2.ffn_up_exps.weight", "blk.1.exp_probs_b.bias"])
def test_a_missing_part_is_said(tmp_path, monkeypatch, part):
    kept = [(name, t) for name, t in tensors(network(V3), split=True) if name != part]
    monkeypatch.setattr("helpers.gguf_files.tensors", lambda *_: kept)
    with pytest.raises(UserError, match=r"model\.layers\.[12]\..* is missing or incomplete"):
        load_gguf(write(tmp_path / "a.gguf", network(V3)))


TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
BIG = {"llama": LLAMA_OF_256, "v3": V3_AHEAD.replace(**LATENT_OF_256)}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        pytest.param(
            config, kind, marks=pytest.mark.slow if name == "llama" and kind not in ("Q8_0", "Q4_K") else (),
            id=f"{name}-{kind}",
        )
        for name, config in BIG.items()
        for kind in TYPES
    ],
)  # fmt: skip
def test_types(tmp_path, config, kind):
    """Expanded or packed, the numbers are those that the gguf library reads."""
    file = write(tmp_path / "a.gguf", network(config), KINDS[kind])
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert sum(t.tensor_type == KINDS[kind] for t in stored.values()) > 10
    import_gguf(file, tmp_path / "model")
    found = load_model(tmp_path / "model")
    for name, values in tensors(found, split=True):
        theirs = gguf.dequantize(np.array(stored[name].data), stored[name].tensor_type)
        assert np.array_equal(values, theirs.reshape(values.shape)), name
    packed, _ = load_gguf(file, torch.float32)
    error = {"Q4_0": 1e-6, "Q4_1": 1e-6, "Q8_0": 1e-6, "Q4_K": 2e-3}.get(kind, 5e-3)
    formats = same_numbers(packed, found, error)
    assert {"Q4_0": "int4", "Q4_1": "int4_mins", "Q4_K": "int4_mins"}.get(kind, "int8_groups") in formats


def same_numbers(packed, whole, error):
    """Compare a packed network's numbers with a whole one's, the others exactly; returns the formats."""
    formats = set()
    for name, module in packed.named_modules():
        for own, value in vars(module).items():
            if isinstance(value, QuantizedWeight):
                expected = whole.get_parameter(f"{name}.{own}").detach()
                ours = torch.stack([dequantize(value, e) for e in range(len(value))]).view_as(expected)
                assert float((ours - expected).abs().max()) <= error * float(expected.abs().max()), name
                formats.add(value.format)
        for own, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            assert torch.equal(value, whole.get_submodule(name).__getattr__(own)), name
    return formats


@pytest.mark.parametrize("config", [LLAMA, QWEN2, V2_LITE, V3_AHEAD], ids=["llama", "qwen2", "v2-lite", "v3"])
@torch.no_grad()
def test_packed_network_computes_nearly_the_same(tmp_path, config):
    """With experts of 40 and 48: not what the kernels' panels of 16 divide."""
    file = write(tmp_path / "a.gguf", network(config), KINDS.Q8_0)
    import_gguf(file, tmp_path / "model")
    whole = load_model(tmp_path / "model")
    packed, tokenizer = load_gguf(file, torch.float32)
    ours, theirs = packed.logits(TOKENS), whole.logits(TOKENS)
    # What rounding activations costs; a few tokens get other experts.
    assert float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()) < 0.1
    prompt, greedy = [5, 77, 30, 8], SamplingParams(temperature=0, max_tokens=1)
    first = [Engine(m, tokenizer).generate([prompt], greedy)[0].tokens for m in (packed, whole)]
    assert first[0] == first[1]


def test_what_is_packed_and_what_is_not(tmp_path):
    packed, _ = load_gguf(write(tmp_path / "a.gguf", network(V3_AHEAD), KINDS.Q4_0))
    routers = [m for m in packed.modules() if isinstance(m, Router)]
    assert {(r.weight.dtype, r.e_score_correction_bias.dtype) for r in routers} == {(torch.float32, torch.float32)}
    layers = packed.model.layers
    assert {layer.self_attn.kv_b_proj.weight.dtype for layer in layers} == {fastest_dtype()}
    experts = layers[1].mlp.experts
    assert (len(experts.gate_up_proj), experts.gate_up_proj.N, experts.gate_up_proj.K) == (8, 96, 64)
    assert isinstance(layers[3].eh_proj.weight, QuantizedWeight)


def test_gate_and_up_of_different_types(tmp_path, monkeypatch):
    """They share one packed tensor, which then has 8 bits."""
    model = network(V3.replace(**LATENT_OF_256))
    named = list(tensors(model, split=True))
    real = gguf.GGUFWriter.add_tensor

    def add(self, name, t, raw_dtype=None):
        if raw_dtype == KINDS.Q4_0 and "ffn_up_exps" in name:
            t, raw_dtype = gguf.quantize(dict(named)[name], KINDS.Q8_0), KINDS.Q8_0
        real(self, name, t, raw_dtype=raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    file = write(tmp_path / "a.gguf", model, KINDS.Q4_0)
    import_gguf(file, tmp_path / "model")
    packed, _ = load_gguf(file, torch.float32)
    assert packed.model.layers[1].mlp.experts.gate_up_proj.format == "int8_groups"
    assert packed.model.layers[1].mlp.experts.down_proj.format == "int4"
    same_numbers(packed, load_model(tmp_path / "model"), 5e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_under_size_plus_a_fifth(tmp_path):
    large = V3.replace(hidden_size=512, moe_intermediate_size=2048, num_hidden_layers=5, n_routed_experts=8)
    write(tmp_path / "large.gguf", network(large), KINDS.Q4_0)
    write(tmp_path / "small.gguf", network(V3), KINDS.Q4_0)
    load = "from rorqual.precision.gguf_weights import load_gguf\nload = lambda path: load_gguf(path)[0]"
    ratio, size = loading_peak(load, tmp_path / "large.gguf", tmp_path / "small.gguf")
    assert size > 50e6
    assert 0.9 < ratio < 1.2


def test_a_file_in_parts(tmp_path):
    model = network(V3)
    whole = write(tmp_path / "whole.gguf", model)
    first, second = (tmp_path / f"part-0000{i}-of-00002.gguf" for i in (1, 2))
    named = list(tensors(model, split=True))
    for path, some in ((first, named[:20]), (second, named[20:])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("helpers.gguf_files.tensors", lambda *_, some=some: some)
            write(path, model, split__count=2)
    expected = load_gguf(whole)[0].logits(TOKENS)
    assert torch.equal(load_gguf(first)[0].logits(TOKENS), expected)
    with pytest.raises(UserError, match=r"give the first, whose name ends in -00001-of-00002\.gguf"):
        load_gguf(second)
    second.unlink()
    with pytest.raises(UserError, match=re.escape(f"{second.name} is missing")):
        load_gguf(first)


# llama.cpp tells V2-Lite from V2 by its 27 layers.
LITE = V2_LITE.replace(num_hidden_layers=27, initializer_range=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False], ids=["split", "joined"])
@pytest.mark.parametrize("config", [LITE, V3], ids=["v2-lite", "v3"])
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path, config, split):
    llama_cpp = pytest.importorskip("llama_cpp")
    file = write(tmp_path / "a.gguf", network(config), split=split)
    import_gguf(file, tmp_path / "model")
    peer = llama_cpp.Llama(model_path=str(file), verbose=False, n_ctx=128, logits_all=True)
    peer.eval(TOKENS[0].tolist())
    theirs, ours = torch.tensor(peer.scores[: TOKENS.shape[1]]), load_model(tmp_path / "model").logits(TOKENS)[0]
    apart = (ours - theirs).norm(dim=-1) / ours.norm(dim=-1)
    assert float(apart.median()) < 0.01  # its cache has 16 bits
    assert float(apart.quantile(0.9)) < 0.05
