import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.fp8_releases import to_fp8
from helpers.peak_memory import loading_peak
from rorqual import ModelConfig, load_model, save_model
from rorqual.checkpoint import model_reader, model_writer
from rorqual.checkpoint.huggingface import stored_dtype
from rorqual.checkpoint.release_tensors import release_tensors
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model.transformer import Transformer

SMALL = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
    eos_token_id=[1, 2],
)
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


def small(config=SMALL):
    torch.manual_seed(0)
    model = Transformer(config)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_()
    return model


@pytest.fixture
def saved(tmp_path):
    save_model(small(), tmp_path / "model")
    return tmp_path / "model"


def tensors_of(model):
    return {name: t.detach() for name, t in model.state_dict().items()}


def assert_same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def edit(path, change):
    """Rewrite the weights after `change(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def set_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, max_shard_bytes, dtype):
    model = small().to(dtype)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.float()
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert stored_dtype(tmp_path / "model") is dtype
    assert_same(load_model(tmp_path / "model", dtype), model)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes > 10**6)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]  # nothing temporary stays


def test_names_and_shapes_are_the_releases(saved):
    tensors = load_file(saved / "model.safetensors")
    assert tensors[GATE].shape == (8, 16)
    assert tensors["model.layers.1.mlp.experts.0.down_proj.weight"].shape == (16, 8)
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    assert {"model.layers.2.shared_head.norm.weight", "model.layers.2.eh_proj.weight"} <= tensors.keys()
    stack = small().model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(tensors[GATE], stack[3, :8])
    assert json.loads((saved / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


def test_dtype_on_load(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32
    expected = small().lm_head.weight.detach().bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


def test_loaded_model_trains(saved):
    model = load_model(saved)
    model.logits(torch.arange(6)[None]).sum().backward()
    assert model.model.layers[1].mlp.experts.gate_up_proj.grad is not None


def test_saving_twice_replaces_weights_and_keeps_other_files(saved):
    save_model(small(), saved, max_shard_bytes=20_000)
    (saved / "README.md").write_text("a card")
    model = small()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save_model(model, saved)
    assert (saved / "README.md").read_text() == "a card"
    assert [f.name for f in saved.glob("*.safetensors*")] == ["model.safetensors"]  # no stale shard or index
    assert_same(load_model(saved), model)


@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_changes_nothing(tmp_path, monkeypatch, existing):
    path = tmp_path / "model"
    if existing:
        save_model(small(), path)
    before = {f.name: f.read_bytes() for f in path.glob("*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_writer, "write_shard", full)
    with pytest.raises(UserError, match=r"cannot be saved .*the disk is full"):
        save_model(small(SMALL.replace(num_nextn_predict_layers=0)), path)
    assert {f.name: f.read_bytes() for f in path.glob("*")} == before
    assert path.exists() == existing
    assert {f.name for f in tmp_path.iterdir()} <= {"model"}


def test_no_place_to_save(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be saved"):
        save_model(small(), tmp_path / "file" / "model")


def test_tied_embeddings(tmp_path):
    model = small(SMALL.replace(tie_word_embeddings=True, num_nextn_predict_layers=0))
    save_model(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    assert_same(load_model(tmp_path / "m"), model)
    edit(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(load_model(tmp_path / "m"), model)  # some releases store the tied head too


def test_harmless_differences_between_releases(saved):
    def change(t):
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        del t["model.layers.2.embed_tokens.weight"], t["model.layers.2.shared_head.head.weight"]

    edit(saved, change)
    assert_same(load_model(saved), small())


def test_multi_token_modules_may_be_absent(saved):
    edit(saved, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.2.")])
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0
    expected = {name: t for name, t in tensors_of(small()).items() if not name.startswith("model.layers.2.")}
    found = tensors_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("block", [(128, 128), (32, 64)])
def test_fp8_release_is_expanded(tmp_path, monkeypatch, block):
    config = SMALL.replace(hidden_size=160, moe_intermediate_size=136, num_nextn_predict_layers=0)
    model = small(config).bfloat16()
    save_model(model, tmp_path / "m")
    expected = {}

    def change(tensors):
        for name in [n for n in tensors if "experts" in n or n.endswith("o_proj.weight")]:
            weight, scale, expected[name] = to_fp8(tensors[name].float(), block)
            tensors |= {name: weight, name + "_scale_inv": scale}

    edit(tmp_path / "m", change)
    quantization = {"quant_method": "fp8", "fmt": "e4m3"} | (
        {} if block == (128, 128) else {"weight_block_size": list(block)}
    )
    set_config(tmp_path / "m", quantization_config=quantization)
    monkeypatch.setattr(model_reader, "CHUNK_BYTES", 1)  # pieces end where blocks do
    found = release_tensors(load_model(tmp_path / "m", dtype=torch.float32))
    assert len(expected) == 3 * 4 + 3 + 2
    for name, plain in expected.items():
        assert torch.equal(found[name], plain), name
    assert stored_dtype(tmp_path / "m") is torch.bfloat16
    assert load_model(tmp_path / "m").lm_head.weight.dtype is fastest_dtype()


def refuses(path, *words):
    with pytest.raises(UserError) as caught:
        load_model(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    return True


def test_bad_directories(tmp_path, saved):
    assert refuses(tmp_path / "nowhere", "nowhere/config.json", "does not exist")
    (saved / "model.safetensors").unlink()
    assert refuses(saved, "model.safetensors does not exist")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    assert refuses(saved, "pickled", "convert")


def test_missing_unexpected_and_misshapen_tensors(saved):
    original = saved.parent / "original"
    shutil.copytree(saved, original)

    def damaged(change):
        edit(saved, change)
        return saved

    def restore():
        shutil.copy(original / "model.safetensors", saved)

    assert refuses(damaged(lambda t: t.pop(GATE)), GATE, "missing")
    restore()
    assert refuses(damaged(lambda t: t.update({GATE: t[GATE].T})), "model.safetensors", GATE, "[16, 8]", "[8, 16]")
    restore()
    assert refuses(damaged(lambda t: t.update(extra=torch.ones(1))), "extra", "unexpected")
    restore()
    assert refuses(damaged(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})), GATE, "_scale_inv")
    restore()

    def wrong_scale(t):
        t |= {GATE: t[GATE].to(torch.float8_e4m3fn), GATE + "_scale_inv": torch.ones(2, 1)}

    assert refuses(damaged(wrong_scale), GATE + "_scale_inv", "[2, 1]")
    restore()
    set_config(saved, num_hidden_layers=10**9)
    assert refuses(saved, "model.layers.999999999", "missing")  # before such a network is built
    set_config(saved, num_hidden_layers=2, quantization_config={"quant_method": "gptq"})
    assert refuses(saved, "gptq")
    set_config(saved, quantization_config={"quant_method": "fp8", "weight_block_size": [128]})
    assert refuses(saved, "weight_block_size")


def test_damaged_shards(saved):
    save_model(small(), saved, max_shard_bytes=20_000)
    index, shards = saved / "model.safetensors.index.json", sorted(saved.glob("*.safetensors"))
    places = json.loads(index.read_text())
    whole = shards[1].read_bytes()
    shards[1].unlink()
    assert refuses(saved, shards[1].name, "does not exist")
    shards[1].write_bytes(whole[:-1])
    assert refuses(saved, shards[1].name, "truncated", "tensor")
    shards[1].write_bytes(whole[:5])
    assert refuses(saved, shards[1].name, "not a valid safetensors file")
    shards[1].write_bytes(whole[:8] + b"[" + whole[9:])
    assert refuses(saved, shards[1].name, "not a valid safetensors file")
    shards[1].write_bytes(whole)
    name = next(n for n, file in places["weight_map"].items() if file == shards[1].name)
    index.write_text(json.dumps({"weight_map": places["weight_map"] | {name: shards[0].name}}))
    assert refuses(saved, shards[0].name, name)
    index.write_text("{")
    assert refuses(saved, "index.json", "not valid JSON")


def test_any_damage_to_a_header_is_one_sentence(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] ^= rng.randrange(1, 256)
        file.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            load_model(saved)
        except UserError:  # anything else fails the test
            refused += 1
    assert refused > 250


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_under_size_plus_a_fifth(tmp_path):
    # 200 MB, half of it one tensor, which must not be held twice
    config = SMALL.replace(hidden_size=512, vocab_size=50_000, tie_word_embeddings=True, num_nextn_predict_layers=0)
    save_model(small(config.replace(moe_intermediate_size=4096, n_routed_experts=4)), tmp_path / "large")
    save_model(small(), tmp_path / "small")
    ratio, _ = loading_peak("from rorqual import load_model as load", tmp_path / "large", tmp_path / "small")
    assert 0.9 < ratio < 1.2


def test_import_is_quick():
    code = "import sys, rorqual; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from rorqual import nothing  # noqa: F401
