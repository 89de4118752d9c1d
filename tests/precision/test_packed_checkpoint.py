"""Packed weights on disk: what comes back, who else reads it, what is said of a broken one."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.peak_memory import loading_peak
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.tokenizer import save_tokenizer, train_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.precision import quantize
from rorqual.precision.packed_checkpoint import load_packed
from rorqual.precision.quantize import convert, load_converted
from rorqual.precision.quantize_checkpoint import quantize_checkpoint
from rorqual.recipe import TokenizerSection

LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=290, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=40, first_k_dense_replace=1,
    num_nextn_predict_layers=1, initializer_range=0.1, max_position_embeddings=64, eos_token_id=0,
)  # fmt: skip
GROUPED = ModelConfig(
    model_type="qwen2", vocab_size=290, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=64,
    rope_interleave=False, tie_word_embeddings=True, attention_bias=True, eos_token_id=0,
)  # fmt: skip


@pytest.fixture(params=[LATENT, GROUPED], ids=["latent", "grouped"])
def source(request, tmp_path):
    torch.manual_seed(1)
    tokenizer = train_tokenizer(["one two three"] * 2, TokenizerSection(vocab_size=290))
    model = Transformer(request.param.replace(vocab_size=len(tokenizer)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    save_model(model, tmp_path / "whole", tokenizer)
    save_tokenizer(tokenizer, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("bits", ["int4", "int8"])
@torch.no_grad()
def test_what_is_read_is_what_packing_in_memory_gives(source, tmp_path, bits):
    quantize_checkpoint(source, tmp_path / "packed", bits)
    tokens = torch.arange(1, 30).unsqueeze(0)
    read, made = load_packed(tmp_path / "packed", torch.float32), convert(load_model(source), bits)
    assert torch.equal(read.logits(tokens), made.logits(tokens))
    answers = [
        Engine(*model).generate(["one two"], SamplingParams(temperature=0, max_tokens=9))[0].tokens
        for model in ((tmp_path / "packed",), (made, Engine(source).tokenizer))
    ]
    assert answers[0] == answers[1]
    with pytest.raises(UserError, match="quantised already"):
        quantize_checkpoint(tmp_path / "packed", tmp_path / "again", bits)


@pytest.mark.parametrize("bits", ["int4", "int8"])
@torch.no_grad()
def test_slices_change_nothing(source, tmp_path, bits, monkeypatch):
    quantize_checkpoint(source, tmp_path / "packed", bits)
    tokens = torch.arange(1, 30).unsqueeze(0)
    expected = load_packed(tmp_path / "packed", torch.float32).logits(tokens)
    monkeypatch.setattr(quantize, "SLICE_WEIGHTS", 1)
    assert torch.equal(load_packed(tmp_path / "packed", torch.float32).logits(tokens), expected)
    assert torch.equal(convert(load_model(source), bits).logits(tokens), expected)
    assert torch.equal(load_converted(source, bits, torch.float32).logits(tokens), expected)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A directory with a model of some 130 MB, "large", and "small", the same with one layer and few tokens."""
    path = tmp_path_factory.mktemp("whole")
    large = GROUPED.replace(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=32_000)
    # Products as large as the other's, for which libraries have code of their own, which counts as memory too.
    small = large.replace(num_hidden_layers=1, vocab_size=290)
    for name, config in (("large", large), ("small", small)):
        save_model(Transformer(config), path / name)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("bits", "stored"),
    [
        ("int4", "packed"),
        ("int8", "packed"),
        ("int4", "whole"),
        ("int8", "whole"),
    ],
)
@pytest.mark.slow
def test_loading_peaks_under_size_plus_a_fifth(sizes, tmp_path, bits, stored):
    if stored == "packed":
        for name in ("large", "small"):
            quantize_checkpoint(sizes / name, tmp_path / name, bits)
    load = "import torch\nfrom pathlib import Path\n"
    if stored == "packed":
        load += (
            "from rorqual.precision.packed_checkpoint import load_packed\nload = lambda path: load_packed(Path(path))"
        )
    else:
        load += "from rorqual.precision.quantize import load_converted\n"
        load += f"load = lambda path: load_converted(Path(path), '{bits}', torch.bfloat16)"
    ratio, size = loading_peak(
        load, *((sizes if stored == "whole" else tmp_path) / name for name in ("large", "small"))
    )
    assert size > 30e6
    assert 0.9 < ratio < 1.2


@pytest.mark.parametrize("bits", ["int4", "int8"])
@torch.no_grad()
def test_its_authors_library_reads_the_same_numbers(source, tmp_path, bits):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantize_checkpoint(source, tmp_path / "packed", bits)
    described = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**described["config_groups"]["group_0"])
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    own = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
    theirs = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    from rorqual.kernels.quantized_linear import dequantize

    ours = dequantize(load_packed(tmp_path / "packed", torch.float32).model.layers[0].self_attn.o_proj.weight)
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-3, atol=1e-6)


def test_what_is_broken_is_named(source, tmp_path):
    packed = tmp_path / "packed"
    quantize_checkpoint(source, packed, "int4")
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight_scale"
    name = name if name in tensors else "model.layers.1.mlp.up_proj.weight_scale"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(UserError, match=name):
        load_packed(packed)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(UserError, match="has shape"):
        load_packed(packed)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_packed(packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rorqual quantize"):
        load_packed(packed)
