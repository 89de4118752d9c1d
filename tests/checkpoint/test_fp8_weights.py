"""FP8 releases that stay FP8: what they say, what is written back, what is said of a broken one."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.fp8_releases import in_fp8, stored_bytes, to_fp8, write_release
from helpers.peak_memory import loading_peak
from helpers.reference_models import CONFIGS, build
from rorqual import load_model, save_model
from rorqual.checkpoint.release_tensors import fp8_weights, release_tensors
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer

# Blocks are partial, and those of gate and up begin anew.
V3 = CONFIGS["v3"] | {"hidden_size": 160, "moe_intermediate_size": 136, "n_routed_experts": 4, "n_group": 2}
V3 |= {"num_experts_per_tok": 2, "topk_group": 1, "initializer_range": 0.1, "num_nextn_predict_layers": 1}
PROMPTS = [[5, 17, 3, 88], [42], [9, 9, 61, 30, 2, 77, 12]]
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
SCALE = GATE + "_scale_inv"


@pytest.fixture(scope="module", params=["fp32", "ue8m0", "e8m0"])
def release(request, tmp_path_factory):
    """(directory, what its tensors stand for)"""
    path = tmp_path_factory.mktemp("fp8") / request.param
    return path, write_release(build(V3), path, request.param)


@pytest.fixture
def small_release(tmp_path):
    write_release(build(V3), tmp_path / "m", shards=1)
    (tmp_path / "m/model.safetensors.index.json").unlink()
    return (tmp_path / "m/part-0.safetensors").rename(tmp_path / "m/model.safetensors").parent


def greedy(model):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [c.tokens for c in Engine(model, max_num_seqs=2).generate(PROMPTS, params)]


def test_it_stays_as_it_is_stored(release, tmp_path):
    path, plain = release
    model = load_model(path, torch.bfloat16, weights="fp8")
    kept = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept} == {
        "embed_tokens",
        "lm_head",
        "gate",
        "eh_proj",
    }
    save_model(model, tmp_path / "again", max_shard_bytes=200_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    found, expected = stored_bytes(tmp_path / "again"), stored_bytes(path)
    assert found.keys() == expected.keys()
    assert sum(name.endswith("_scale_inv") for name in found) == sum(map(in_fp8, plain)) > 40
    assert [name for name in expected if found[name] != expected[name]] == []
    configs = [json.loads((at / "config.json").read_text()) for at in (tmp_path / "again", path)]
    assert configs[0] == configs[1]


def test_products_are_those_of_the_expanded_release(release):
    path, plain = release
    expanded, kept = load_model(path, torch.float32), load_model(path, torch.float32, weights="fp8")
    found = release_tensors(expanded)
    assert all(torch.equal(found[name], t) for name, t in plain.items())
    tokens = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(kept.logits(tokens), expanded.logits(tokens), atol=1e-4, rtol=1e-5)
    assert greedy(kept) == greedy(expanded)


def test_greedy_tokens_are_those_of_transformers(release, tmp_path):
    """Theirs reads a directory of the dequantised weights."""
    transformers = pytest.importorskip("transformers")
    path, plain = release
    own = {name: t for name, t in plain.items() if not name.startswith("model.layers.3.")}
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 0, "torch_dtype": "float32"}
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(own, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert [keys for name, keys in report.items() if name.endswith("_keys") and keys] == []
    assert theirs.dtype is torch.float32
    found = greedy(load_model(path, torch.float32, weights="fp8"))
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        mask = torch.ones_like(given)
        expected = theirs.generate(
            given, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert tokens == expected[0, len(prompt) :].tolist()
        assert len(set(tokens)) >= 5


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_exported_as_fp8(tmp_path, scales):
    model = build(V3)
    save_model(model, tmp_path / "fp8", fp8=scales)
    save_model(model, tmp_path / "plain")
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fp8"))
    quantization = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    more = {"scale_fmt": "ue8m0"} if scales == "ue8m0" else {}
    assert quantization == more | {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }  # fmt: skip
    assert found.keys() == plain.keys() | {name + "_scale_inv" for name in plain if in_fp8(name)}
    for name, tensor in plain.items():
        if in_fp8(name):
            codes, scale, _ = to_fp8(tensor, powers_of_two=scales == "ue8m0")
            torch.testing.assert_close(found[name + "_scale_inv"], scale, atol=0, rtol=2e-7)
            assert found[name].view(torch.uint8).ne(codes.view(torch.uint8)).float().mean() < 1e-3  # ties
        else:
            assert torch.equal(found[name], tensor)
    if scales == "fp32":  # rounding while loading is the same
        rounded = release_tensors(load_model(tmp_path / "plain", weights="fp8"))
        assert all(torch.equal(rounded[name].float(), t.float()) for name, t in found.items())
    kept = load_model(tmp_path / "fp8", weights="fp8")
    with pytest.raises(UserError, match="in FP8 already"):
        save_model(kept, tmp_path / "again", fp8=scales)


def test_a_release_of_which_some_linears_are_plain(small_release, tmp_path):
    def widen(tensors):
        for layer in range(4):
            name = f"model.layers.{layer}.self_attn.o_proj.weight"
            tensors[name] = tensors[name].bfloat16()
            del tensors[name + "_scale_inv"]

    edit(small_release, widen)
    model = load_model(small_release, torch.bfloat16, weights="fp8")
    assert not any("o_proj" in name for name, _ in fp8_weights(model))
    save_model(model, tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(small_release)
    quantization = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert quantization["modules_to_not_convert"] == [
        "lm_head", *(f"model.layers.{layer}.self_attn.o_proj" for layer in range(4))
    ]  # fmt: skip


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def put(name, value):
    """A change that writes the value into a tensor's last place."""
    return lambda tensors: tensors[name].flatten().view(-1)[-1:].fill_(value)


def test_broken_releases(small_release, tmp_path):
    whole = tmp_path / "whole"
    shutil.copy(small_release / "model.safetensors", whole)
    cases = [
        (lambda t: t.pop(SCALE), (GATE, SCALE, "is missing")),
        (lambda t: t.update({SCALE: torch.ones(1, 2)}), (SCALE, "[1, 2]", "128×128")),
        (lambda t: t.update({SCALE: t[SCALE].to(torch.int32)}), (SCALE, "int32")),
        (lambda t: t.update({GATE: t[GATE].bfloat16()}), (GATE, "bfloat16", "E4M3")),
        *((put(SCALE, value), (SCALE, "not above 0")) for value in (0.0, -1e-3, float("nan"), float("inf"))),
        (lambda t: t.update({SCALE: t[SCALE].bfloat16()}), ("experts.gate_up_proj", "different dtypes")),
    ]
    for change, words in cases:
        shutil.copy(whole, small_release / "model.safetensors")
        edit(small_release, change)
        refuses(small_release, *words)
    shutil.copy(whole, small_release / "model.safetensors")
    fields = [
        ("weight_block_size", [128, 0]), ("weight_block_size", [128]), ("weight_block_size", [True, 128]),
        ("weight_block_size", ["128", 128]), ("quant_method", "awq"), ("fmt", "e5m2"), ("scale_fmt", "e5m10"),
    ]  # fmt: skip
    config = json.loads((small_release / "config.json").read_text())
    for name, value in fields:
        changed = config["quantization_config"] | {name: value}
        (small_release / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        refuses(small_release, name, "config.json")


def test_a_shard_that_is_not_there(release, tmp_path):
    shutil.copytree(release[0], tmp_path / "m")
    (tmp_path / "m/part-1.safetensors").unlink()
    refuses(tmp_path / "m", "part-1.safetensors does not exist")


def refuses(path, *words):
    with pytest.raises(UserError) as caught:
        load_model(path, weights="fp8")
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [word for word in words if word not in sentence] == [], sentence


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", ["fp8", "plain"])
@pytest.mark.slow
def test_loading_takes_a_byte_a_parameter(tmp_path, stored):
    config = ModelConfig(**(V3 | {"hidden_size": 1024, "moe_intermediate_size": 2048, "num_hidden_layers": 3}))
    for name, network in (("small", ModelConfig(**V3)), ("large", config)):
        model = Transformer(network).bfloat16()
        save_model(model, tmp_path / name, fp8="fp32" if stored == "fp8" else None)
    parameters = sum(p.numel() for p in model.parameters())
    load = "import torch\nfrom rorqual import load_model\n"
    load += "load = lambda path: load_model(path, torch.bfloat16, weights='fp8')"
    ratio, size = loading_peak(load, tmp_path / "large", tmp_path / "small")
    assert parameters > 60e6
    assert size < 1.1 * parameters
    assert 0.9 < ratio < 1.35
