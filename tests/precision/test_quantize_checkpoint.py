"""Calibrated and FP8 directories: what is read back, what the report says, what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rorqual.checkpoint.fp8_blocks import round_weight
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.block_scaled import decode
from rorqual.kernels.number_formats import FP8_BLOCK
from rorqual.kernels.quantized_linear import QuantizedWeight, dequantize
from rorqual.model import ModelConfig, Transformer
from rorqual.precision import calibration_text
from rorqual.precision import quantize_checkpoint as module
from rorqual.precision.calibration_text import OWN_TEXT, TextSettings, read_windows
from rorqual.precision.packed_checkpoint import load_packed
from rorqual.precision.quantize_checkpoint import quantize_checkpoint
from rorqual.recipe import TokenizerSection

LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=290, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    num_nextn_predict_layers=1, initializer_range=0.1, max_position_embeddings=64, eos_token_id=0,
)  # fmt: skip
GROUPED = ModelConfig(
    model_type="qwen2", vocab_size=290, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=64,
    rope_interleave=False, tie_word_embeddings=True, attention_bias=True, eos_token_id=0,
)  # fmt: skip
LINES = [f"{i} and {i + 1} make {2 * i + 1}, they say; {i * i} is a square." for i in range(120)]


def made(path, config):
    torch.manual_seed(1)
    tokenizer = train_tokenizer(LINES, TokenizerSection(vocab_size=290))
    model = Transformer(config.replace(vocab_size=len(tokenizer)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
        if name.endswith("norm.weight"):  # channels of uneven size
            torch.nn.init.uniform_(p, 0.2, 4)
    save_model(model, path, tokenizer)
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture(params=[LATENT, GROUPED], ids=["latent", "grouped"])
def source(request, tmp_path):
    return made(tmp_path / "whole", request.param)


@pytest.fixture
def grouped(tmp_path):
    return made(tmp_path / "whole", GROUPED)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


def unpacked(path):
    """The model with the weights as stored; embedding and head, which are stored whole, as the file has them."""
    packed, stored = load_packed(path, torch.float32), load_file(path / "model.safetensors")
    model = Transformer(packed.config)
    modules = dict(packed.named_modules())
    with torch.no_grad():
        for name, p in model.named_parameters():
            owner, _, own = name.rpartition(".")
            value = getattr(modules[owner], own)
            if name in stored:
                p.copy_(stored[name])
            elif isinstance(value, QuantizedWeight):
                p.copy_(torch.stack([dequantize(value, e) for e in range(len(value))]).view_as(p))
            else:
                p.copy_(value)
        for name, b in model.named_buffers():
            b.copy_(stored[name])
    return model


@torch.no_grad()
def perplexity(model, windows):
    logprobs = model.logits(windows)[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])
    return math.exp(-float(logprobs.mean()))


@pytest.mark.parametrize(("format", "method"), [("int4", "gptq"), ("int4", "awq"), ("int8", "gptq"), ("int4", "rtn")])
def test_the_report_is_about_what_is_read(source, tmp_path, text, format, method):
    found = quantize_checkpoint(source, tmp_path / "packed", format, method, TextSettings(text, samples=20))
    windows = read_windows(TextSettings(text, samples=20), load_tokenizer(source), 64, True)
    assert len(windows.calibration) == 20
    assert found.calibration_tokens == 20 * 64
    assert found.perplexity.tokens == len(windows.heldout) * 63
    assert found.perplexity.before == pytest.approx(perplexity(load_model(source), windows.heldout), rel=1e-4)
    assert found.perplexity.after == pytest.approx(perplexity(unpacked(tmp_path / "packed"), windows.heldout), rel=1e-4)
    for path, size in ((source, found.bytes_before), (tmp_path / "packed", found.bytes_after)):
        assert (path / "model.safetensors").stat().st_size == size
    config = load_model(source).config
    assert [layer.layer for layer in found.layers] == [
        f"model.layers.{i}" for i in range(config.num_hidden_layers + config.num_nextn_predict_layers)
    ]
    least, most = (1e-3, 0.3) if format == "int4" else (1e-4, 0.02)
    assert all(least < error < most for layer in found.layers for error in layer.linears.values())
    assert found.rounded_to_nearest == []
    whole = found.to_dict()
    assert json.loads(json.dumps(whole))["error_of"] == "outputs"
    assert whole["perplexity"]["change"] == pytest.approx(found.perplexity.after / found.perplexity.before - 1)


@torch.no_grad()
def test_an_error_is_that_of_a_linears_outputs(grouped, tmp_path, text):
    found = quantize_checkpoint(grouped, tmp_path / "packed", "int4", "rtn", TextSettings(text, samples=20))
    windows = read_windows(TextSettings(text, samples=20), load_tokenizer(grouped), 64, True).calibration
    exact, rounded = load_model(grouped), unpacked(tmp_path / "packed")
    inputs = []
    for model in (exact, rounded):
        hook = model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(windows)
        hook.remove()
    outputs = [x @ m.layers[0].self_attn.q_proj.weight.T for x, m in zip(inputs, (exact, rounded), strict=True)]
    expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert found.layers[0].linears["self_attn.q_proj"] == pytest.approx(expected, rel=1e-3)
    plain = quantize_checkpoint(grouped, tmp_path / "again", "int8")
    assert (plain.perplexity, plain.calibration, plain.to_dict()["error_of"]) == (None, None, "weights")
    weight, read = load_model(grouped).layers[0].mlp.down_proj.weight, unpacked(tmp_path / "again")
    error = float((read.layers[0].mlp.down_proj.weight - weight).norm() / weight.norm())
    assert plain.layers[0].linears["mlp.down_proj"] == pytest.approx(error, rel=1e-4)


def test_calibrated_layers_lose_less_than_rounded_ones(source, tmp_path, text):
    errors = {}
    for method in ("rtn", "gptq", "awq"):
        found = quantize_checkpoint(source, tmp_path / method, "int4", method, TextSettings(text, samples=20))
        errors[method] = [layer.mean for layer in found.layers]
    for own, plain in zip(errors["gptq"], errors["rtn"], strict=True):
        assert own < 0.9 * plain
    assert sum(errors["awq"]) < sum(errors["rtn"])


def test_an_expert_that_sees_little_is_rounded_to_nearest(tmp_path, text):
    source = made(tmp_path / "whole", LATENT)
    model = load_model(source)
    with torch.no_grad():  # one expert is never chosen
        model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
    save_model(model, source, load_tokenizer(source))
    found = quantize_checkpoint(source, tmp_path / "packed", "int4", "gptq", TextSettings(text, samples=20))
    names = [f"model.layers.1.mlp.experts.2.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    assert found.rounded_to_nearest == names
    plain = quantize_checkpoint(source, tmp_path / "plain", "int4", "rtn")
    assert plain.rounded_to_nearest == []
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    for name in names:
        assert torch.equal(a[f"{name}.weight_packed"], b[f"{name}.weight_packed"])
    assert not torch.equal(a[f"{names[0].replace('.2.', '.1.')}.weight_packed"],
                           b[f"{names[0].replace('.2.', '.1.')}.weight_packed"])  # fmt: skip


def test_fp8_is_as_deepseek_releases_it(source, tmp_path):
    found = quantize_checkpoint(source, tmp_path / "fp8", "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    stored, exact = load_file(tmp_path / "fp8" / "model.safetensors"), load_file(source / "model.safetensors")
    for name, whole in exact.items():
        kept = name.endswith(("norm.weight", "bias", "embed_tokens.weight", "head.weight", "mlp.gate.weight"))
        kept = kept or name.endswith("eh_proj.weight")
        if kept:
            assert torch.equal(stored[name], whole), name
            continue
        assert stored[name].dtype == torch.float8_e4m3fn, name
        values = stored[name].float() * stored[f"{name}_scale_inv"][0, 0]  # all fit one block
        torch.testing.assert_close(values, whole, rtol=2**-4, atol=float(whole.abs().max()) / 448 * 2**-9)
    read = load_model(tmp_path / "fp8", torch.float32)
    down = read.layers[0].mlp.down_proj.weight
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(down, stored[name].float() * stored[f"{name}_scale_inv"])
    assert all(0.01 < error < 0.04 for layer in found.layers for error in layer.linears.values())
    assert quantize_checkpoint(tmp_path / "fp8", tmp_path / "int8", "int8").bytes_after > 0


def test_fp8_blocks_have_scales_of_their_own():
    weight = torch.randn(200, 300) * torch.cat([torch.ones(128), torch.full((172,), 1e-3)])
    weight[:128, 128:256] = 0
    numbers, scale = round_weight(weight, FP8_BLOCK)
    assert scale.shape == (2, 3)
    assert scale[0, 0] == weight[:128, :128].abs().max() / 448
    assert scale[1, 2] == weight[128:, 256:].abs().max() / 448
    assert numbers[:128, :128].float().abs().max() == 448
    read = decode(numbers.view(torch.uint8), scale, FP8_BLOCK, 300)
    assert read[:128, 128:256].eq(0).all()
    torch.testing.assert_close(read, weight, rtol=2**-4, atol=2e-5)


@torch.no_grad()
def test_transformers_reads_fp8(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    config = GROUPED.replace(hidden_size=128, intermediate_size=256, num_key_value_heads=4)  # blocks divide all sizes
    quantize_checkpoint(made(tmp_path / "whole", config), tmp_path / "fp8", "fp8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    tokens = torch.arange(1, 30).unsqueeze(0)
    ours = load_model(tmp_path / "fp8", torch.float32).logits(tokens)
    error = (theirs(tokens).logits.float() - ours).norm() / ours.norm()
    assert error < 0.02  # they expand to BF16


@pytest.mark.parametrize("method", ["gptq", "awq"])
@torch.no_grad()
def test_transformers_reads_what_is_calibrated(grouped, tmp_path, text, method):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    quantize_checkpoint(grouped, tmp_path / "packed", "int4", method, TextSettings(text, samples=20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    tokens = torch.arange(1, 30).unsqueeze(0)
    torch.testing.assert_close(
        theirs(tokens).logits, unpacked(tmp_path / "packed").logits(tokens), rtol=1e-2, atol=1e-2
    )


def test_conversations_rows_and_held_out_files(grouped, tmp_path, text):
    tokenizer = load_tokenizer(grouped)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    records = tmp_path / "records.jsonl"
    talk = [{"role": "user", "content": LINES[0]}, {"role": "assistant", "content": LINES[1]}]
    records.write_text("\n".join(map(json.dumps, [{"text": LINES[2]}, {"messages": talk}] * 40)))
    found = read_windows(TextSettings(records, samples=8), tokenizer, 32, True)
    assert tokenizer.decode(found.calibration.flatten()).startswith(f"{LINES[2]}{tokenizer.eos_token}")
    assert f"user: {LINES[0]}" in tokenizer.decode(found.calibration.flatten())
    assert len(found.calibration) == 8
    assert len(found.heldout) == calibration_text.HELDOUT_WINDOWS
    apart = read_windows(TextSettings(records, text, samples=8), tokenizer, 32, True)
    assert torch.equal(apart.calibration, found.calibration)
    assert tokenizer.decode(apart.heldout[0]).startswith("0 and 1 make 1")
    assert (apart.text, apart.heldout_text) == (str(records), str(text))
    only = read_windows(TextSettings(None, text), tokenizer, 32, False)
    assert (only.calibration, only.text) == (None, None)
    own = read_windows(TextSettings(samples=4), tokenizer, 32, True)
    assert (len(own.calibration), own.text) == (4, OWN_TEXT)
    records.write_text('{"words": "a"}\n')
    with pytest.raises(UserError, match=r"line 1 has neither a text nor messages but \['words'\]"):
        read_windows(TextSettings(records), tokenizer, 32, True)


def test_no_window_is_both_calibrated_on_and_held_out(grouped, text):
    tokenizer = load_tokenizer(grouped)
    whole = tokenizer("\n".join(LINES)).input_ids
    for samples in (5, 10**6):
        found = read_windows(TextSettings(text, samples=samples), tokenizer, 16, True)
        both = torch.cat([found.calibration, found.heldout])
        assert both.flatten().tolist() == whole[: both.numel()]
        assert len(found.heldout) >= 1
        assert len(found.calibration) <= samples


def test_what_cannot_be_done_is_said(grouped, tmp_path, text):
    dest = tmp_path / "dest"
    with pytest.raises(UserError, match="--method gptq is for integers; fp8 is rounded to nearest"):
        quantize_checkpoint(grouped, dest, "fp8", "gptq")
    with pytest.raises(UserError, match="--sequence-length 65: the model reads at most 64 tokens"):
        quantize_checkpoint(grouped, dest, "int4", "gptq", TextSettings(text, sequence_length=65))
    with pytest.raises(UserError, match=r"--method awq needs 128 tokens to calibrate on, but .*text.txt gives 16"):
        quantize_checkpoint(grouped, dest, "int4", "awq", TextSettings(text, samples=1, sequence_length=16))
    short = tmp_path / "short.txt"
    short.write_text("one two")
    with pytest.raises(UserError, match=r"short.txt has \d+ tokens, which is too short for 2 windows of 64"):
        quantize_checkpoint(grouped, dest, "int4", "gptq", TextSettings(short))
    with pytest.raises(UserError, match="does not exist"):
        quantize_checkpoint(grouped, dest, "int4", "rtn", TextSettings(tmp_path / "none.txt"))
    quantize_checkpoint(grouped, tmp_path / "fp8", "fp8")
    with pytest.raises(UserError, match="quantised already"):
        quantize_checkpoint(tmp_path / "fp8", dest, "fp8")
    assert not dest.exists()


def test_a_failure_leaves_what_was_there(grouped, tmp_path, monkeypatch):
    quantize_checkpoint(grouped, tmp_path / "dest", "int8")
    before = {path.name: path.read_bytes() for path in (tmp_path / "dest").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_weights", full)
    with pytest.raises(UserError, match="the disk is full"):
        quantize_checkpoint(grouped, tmp_path / "dest", "int4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "dest").iterdir()} == before
    assert not list(tmp_path.glob(".writing*"))
