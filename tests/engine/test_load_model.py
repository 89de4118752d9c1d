"""Where a model's weights can go."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from helpers.small_configs import GROUPED
from rorqual.engine import Engine, engine, load_model
from rorqual.engine.load_model import open_model
from rorqual.engine.paged_kv_cache import PagedKVCache, block_bytes
from rorqual.errors import UserError
from rorqual.model import Transformer


def test_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU here"):
        open_model(tmp_path, device="cuda")


@pytest.mark.parametrize("what", ["a .gguf file", "a packed directory", "packing"])
def test_packed_weights_are_for_a_cpu(monkeypatch, tmp_path, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load_model, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(load_model, "is_quantized", lambda _: what == "a packed directory")
    path = tmp_path / ("model.gguf" if what == "a .gguf file" else "model")
    with pytest.raises(UserError, match="quantised weights are for a CPU; leave out --weights"):
        open_model(path, device="cuda", weights="int4" if what == "packing" else None)


def test_a_cache_that_memory_has_no_room_for(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(engine, "PagedKVCache", full)
    with pytest.raises(UserError, match=r"no memory for a KV cache of 4 GiB; lower --cache-gb"):
        Engine(Transformer(GROUPED), kv_cache_bytes=4 << 30).prepare()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_cache_takes_no_memory_before_it_is_written(dtype):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = PagedKVCache(GROUPED, (1 << 28) // block_bytes(GROUPED, dtype), dtype, torch.device("cpu"))
    stores = [store for layer in cache.layers for store in layer]
    assert sum(store.nbytes for store in stores) > 1 << 27
    assert resident() - before < 1 << 26
    assert not any(store[i].any() for store in stores for i in (0, -1))
