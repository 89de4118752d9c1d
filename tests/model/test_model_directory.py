"""Each thing that can be wrong with a file is said for what it is."""

import errno
import os
import re
from pathlib import Path

import pytest

from helpers.gguf_files import network, write
from rorqual import load_model, load_tokenizer, save_model
from rorqual.checkpoint.describe import read_released
from rorqual.checkpoint.gguf_import import import_gguf, import_model
from rorqual.engine.load_model import open_model
from rorqual.errors import UserError
from rorqual.model import ModelConfig
from rorqual.precision.quantize_checkpoint import quantize_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 134\n"
CONTENTS = {
    b"": "is empty",
    LFS: "is a Git LFS pointer",
    b"<!DOCTYPE html><html></html>": "is a web page",
    b"\n <html>": "is a web page",
    b"PK\x03\x04" + bytes(60): "is a zip archive",
    b"\x80\x02}q\x00.": "is a Python pickle",
}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def model(tmp_path):
    import_gguf(write(tmp_path / "a.gguf", network()), tmp_path / "model")
    return tmp_path / "model"


def complaint(read, *args):
    with pytest.raises(UserError) as caught:
        read(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reader(name):
    return load_tokenizer if name.startswith("tokenizer") else load_model


@pytest.mark.parametrize("name", FILES)
def test_contents_that_are_something_else(model, name):
    for content, words in CONTENTS.items():
        (model / name).write_bytes(content)
        sentence = complaint(reader(name), model)
        assert sentence.startswith(f"{model / name} {words}"), sentence


def test_contents_of_a_gguf_file(tmp_path):
    for content, words in CONTENTS.items():
        (tmp_path / "a.gguf").write_bytes(content)
        assert complaint(open_model, tmp_path / "a.gguf").startswith(f"{tmp_path / 'a.gguf'} {words}")


def test_one_kind_of_weights_under_the_name_of_the_other(model):
    weights, file = model / "model.safetensors", model.parent / "a.gguf"
    whole, header = file.read_bytes(), weights.read_bytes()
    weights.write_bytes(whole)
    assert "is a GGUF file" in complaint(load_model, model)
    file.write_bytes(header)
    assert "not a readable GGUF file" in complaint(open_model, file)


def test_a_download_cut_short(model):
    weights, file = model / "model.safetensors", model.parent / "a.gguf"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    assert "it ends inside its header" in complaint(load_model, model)
    weights.write_bytes(whole[:-40])
    assert "is truncated" in complaint(load_model, model)
    file.write_bytes(file.read_bytes()[:-40])
    assert "ends inside tensor" in complaint(open_model, file)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_or_a_broken_link_in_its_place(model, name):
    (model / name).unlink()
    (model / name).mkdir()
    assert f"{model / name} is a directory" in complaint(reader(name), model)
    (model / name).rmdir()
    (model / name).symlink_to(model / "blob")
    assert f"{model / name} is a link to {model / 'blob'}, which does not exist" in complaint(reader(name), model)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "cannot be read (Permission denied); change its permissions"),
        (errno.EMFILE, "cannot be read (Too many open files); raise the limit of open files"),
        (errno.EIO, "cannot be read (Input/output error); check the disk"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "a.gguf"])
def test_errors_of_the_system(model, monkeypatch, name, number, words):
    path = model.parent / name if name == "a.gguf" else model / name
    whole = Path.open

    def refuse(self, *args, **kwargs):
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    sentence = complaint(open_model if name == "a.gguf" else load_model, path if name == "a.gguf" else model)
    assert sentence.startswith(f"{path} {words}")


def test_a_gguf_file_where_a_directory_is_needed(model):
    file = model.parent / "a.gguf"
    assert f"make one: rorqual import {file} DIRECTORY" in complaint(load_model, file)


def test_saving_keeps_no_directory_from_being_replaced(model):
    save_model(load_model(model), model, load_tokenizer(model))
    assert load_model(model).config.model_type == "llama"


def test_a_model_is_not_written_over_what_it_is_made_from(model, tmp_path):
    before = (model / "model.safetensors").read_bytes()
    for make in (import_model, lambda source, dest: quantize_checkpoint(source, dest, "int4")):
        with pytest.raises(UserError, match="is the source model itself; give another directory"):
            make(model, model.parent / "." / model.name)
    assert (model / "model.safetensors").read_bytes() == before
    home = tmp_path / "home"
    home.mkdir()
    (home / "model-of-mine.safetensors").write_text("mine")
    for make in (import_model, lambda source, dest: quantize_checkpoint(source, dest, "int4")):
        with pytest.raises(UserError, match=r"is not a model directory \(it holds model-of-mine.safetensors\)"):
            make(model, home)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file cannot be written \(Not a directory\)"):
        import_model(model, tmp_path / "file")
    assert [p.name for p in home.iterdir()] == ["model-of-mine.safetensors"]


def test_the_folder_of_a_run_that_has_not_ended(tmp_path):
    (tmp_path / "recipe.toml").write_text("name = 'cold-start'")
    (tmp_path / "checkpoints").mkdir()
    message = f"{re.escape(str(tmp_path))} is the folder of a run that has no model yet; let it end .--resume"
    for load in (load_tokenizer, ModelConfig.load, load_model, read_released):
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    with pytest.raises(UserError, match=r"other/config\.json does not exist; fetch it"):
        ModelConfig.load(tmp_path / "other")
