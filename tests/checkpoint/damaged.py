"""Damaged files: bytes flipped, cut, moved and made huge at random, values of JSON replaced by odd ones.

Whatever is done, a file loads and the network computes, or one sentence refuses it; nothing else is raised, nothing
hangs, and no more memory is asked for than files of this size can need. test_damaged.py runs these tests.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from helpers.corruption import damaged, odd
from helpers.gguf_files import KINDS, LLAMA, V3, network, write
from rorqual import load_model, load_tokenizer, save_model
from rorqual.checkpoint.gguf_import import import_gguf
from rorqual.cli.entry import main
from rorqual.data.tokenizer import save_tokenizer, train_tokenizer
from rorqual.errors import UserError
from rorqual.precision.gguf_weights import load_gguf
from rorqual.recipe import TokenizerSection

ROOM = 1 << 30  # address space that loading files of some hundred KB may take; a thread alone takes 64 MB of it
PATIENCE = 30  # seconds for what takes a tenth of one
SHARE = float(os.environ.get("SHARE_OF_DAMAGES", "1"))
V3_AHEAD = V3.replace(num_nextn_predict_layers=1, hidden_size=32, rope_scaling=V3.rope_scaling | {"factor": 4.0})


def times(count):
    return range(int(count * SHARE))


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for damage."""


@pytest.fixture(autouse=True)
def bounds():
    """An allocation of gigabytes fails, and nothing waits for another thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))

    def alarm(*_):
        raise Hang

    before, threads = signal.signal(signal.SIGALRM, alarm), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@torch.no_grad()
def refused(load, *arguments):
    """Whether a file is refused, with one sentence. Anything else that is raised fails the test."""
    signal.alarm(PATIENCE)
    try:
        model = load(*arguments)
        if isinstance(model, torch.nn.Module):
            model.logits(torch.tensor([[1, 2, 3]]))
        return False
    except UserError as e:
        sentence = str(e)
        assert len(sentence.splitlines()) == 1, sentence
        assert "allocate" not in sentence, sentence
        assert "memory" not in sentence, sentence
        assert len(sentence) < 1000, sentence
        return True
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("config", [LLAMA, V3_AHEAD], ids=["llama", "deepseek2"])
def test_gguf(tmp_path, monkeypatch, config):
    monkeypatch.setattr("rorqual.checkpoint.gguf_import.save_model", lambda *_: None)
    file = write(tmp_path / "a.gguf", network(config), KINDS.Q8_0)
    whole = file.read_bytes()
    header = whole.index(b"output_norm.weight") + 100
    rng, count = random.Random(0), 0
    for i in times(400):
        file.write_bytes(damaged(rng, whole, header if i % 8 else len(whole)))
        count += refused(import_gguf, file, tmp_path / "model") if i % 4 == 0 else refused(packed, file)
    assert 200 * SHARE < count <= 400 * SHARE
    file.write_bytes(whole)
    assert not refused(packed, file)


def packed(file):
    return load_gguf(file, torch.float32)[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small model as it is released, in one shard."""
    path = tmp_path_factory.mktemp("damaged") / "model"
    tokenizer = train_tokenizer(["one two three"] * 2, TokenizerSection(vocab_size=290))
    save_model(network(V3_AHEAD.replace(vocab_size=len(tokenizer))), path, tokenizer)
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture
def model(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "model")


def test_safetensors_headers(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng, count = random.Random(0), 0
    for _ in times(300):
        file.write_bytes(damaged(rng, whole, header))
        count += refused(load_model, model)
    entries = json.loads(whole[8:header])
    for _ in times(200):
        text = json.dumps(odd(rng, entries)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[header:])
        count += refused(load_model, model)
    assert 400 * SHARE < count <= 500 * SHARE


def test_index(directory, tmp_path):
    model = tmp_path / "model"
    save_model(load_model(directory), model, max_shard_bytes=60_000)
    index = model / "model.safetensors.index.json"
    whole = index.read_bytes()
    rng, count = random.Random(0), 0
    for _ in times(150):
        index.write_bytes(damaged(rng, whole, len(whole)))
        count += refused(load_model, model)
    for _ in times(150):
        index.write_text(json.dumps(odd(rng, json.loads(whole))))
        count += refused(load_model, model)
    assert 200 * SHARE < count <= 300 * SHARE


def test_config(model):
    file = model / "config.json"
    whole = file.read_bytes()
    rng, count = random.Random(0), 0
    for _ in times(200):
        file.write_bytes(damaged(rng, whole, len(whole)))
        count += refused(load_model, model)
    config = json.loads(whole) | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for _ in times(500):
        file.write_text(json.dumps(odd(rng, config)))
        count += refused(load_model, model)
    assert 400 * SHARE < count <= 700 * SHARE


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts", "qk_rope_head_dim", "vocab_size"]
)
def test_sizes_that_would_take_for_ever(model, name):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 2**31 - 8}))
    assert refused(load_model, model)


def test_lengths_that_no_file_has(model, tmp_path):
    file = write(tmp_path / "a.gguf", network(LLAMA))
    whole = bytearray(file.read_bytes())
    types = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4
    whole[types + 4 + 6] = 1  # the array's length, 2^48 longer
    file.write_bytes(whole)
    assert refused(packed, file)
    weights = model / "model.safetensors"
    with weights.open("r+b") as opened:  # a file with a hole, and a header that reaches over it
        opened.write((4 << 30).to_bytes(8, "little"))
        opened.truncate(8 << 30)
    assert refused(load_model, model)


def test_tokenizer(model):
    file = model / "tokenizer.json"
    whole = file.read_bytes()
    rng, count = random.Random(0), 0
    for _ in times(200):
        file.write_bytes(damaged(rng, whole, len(whole)))
        count += refused(load_tokenizer, model)
    for _ in times(200):
        file.write_text(json.dumps(odd(rng, json.loads(whole))))
        count += refused(load_tokenizer, model)
    assert 100 * SHARE < count <= 400 * SHARE


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "a.gguf"])
def test_the_command_line_says_one_sentence(model, tmp_path, name, monkeypatch, capsys):
    place = model
    if name == "a.gguf":
        place = write(tmp_path / name, network(LLAMA))
    cut(model / name if place == model else place)
    monkeypatch.setattr(sys, "argv", ["rorqual", "generate", str(place), "x"])
    with pytest.raises(SystemExit) as left:
        main()
    said, error = capsys.readouterr()
    assert left.value.code == 2
    assert said == ""
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("rorqual: ")
    assert name in error
