"""Read the tensors of a model directory: shards, index, FP8 blocks; checked before any weight is read."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.fp8_blocks import SCALE_SUFFIX, block_size, expand, scale_shape
from rorqual.checkpoint.release_tensors import (
    EMBEDDING,
    allocate,
    meta_model,
    own_tensors,
    release_tensors,
    shared_copies,
)
from rorqual.checkpoint.safetensors_io import CHUNK_BYTES, INDEX, WEIGHTS, TensorEntry, read_header
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import model_directory, read_json
from rorqual.model.release_settings import ReleaseSettings
from rorqual.model.transformer import Layer, Transformer


@dataclass
class CheckpointReader:
    """Reads the tensors of a checked directory."""

    outline: Transformer  # on the meta device
    stored: dict[str, TensorEntry]
    required: list[str]  # names of the model's tensors, each once
    block: tuple[int, int]  # of FP8 weights with a scale

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a tensor as stored; FP8 weights dequantised."""
        found, scale = self.stored[name], self.stored.get(name + SCALE_SUFFIX)
        last = found.shape[0] if last is None else min(last, found.shape[0])
        if scale is None:
            return found.rows(first, last)
        block = min(self.block[0], found.shape[0]), min(self.block[1], found.shape[1])  # however large config.json says
        begin = first // block[0]
        scales = scale.rows(begin, -(-last // block[0]))
        return expand(found.rows(begin * block[0], last), scales, block)[first - begin * block[0] :]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read the named tensors into the given memory, a chunk of rows at a time."""
        for name in sorted(tensors, key=lambda name: self.stored[name].path):
            rows = max(1, CHUNK_BYTES // max(1, self.stored[name].row_bytes))
            for first in range(0, self.stored[name].shape[0], rows):
                tensors[name][first : first + rows].copy_(self.rows(name, first, first + rows))

    def layer(self, index: int) -> Layer:
        """One of the main network's layers in FP32."""
        with torch.device("meta"):
            layer = Layer(self.outline.config, index)
        allocate(layer, torch.float32, "cpu")
        self.fill(own_tensors(layer, f"model.layers.{index}"))
        return layer


def open_release(path: Path) -> CheckpointReader:
    """Check a directory before weights are read. Raises UserError."""
    path = model_directory(path)
    config, released, stored = read_directory(path)
    block = block_size(read_json(path / "config.json"), str(path / "config.json"))
    _check(path, _guard_shapes(config), stored, set(), block)
    model = meta_model(config)
    model.released = released
    optional = set(shared_copies(model))
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    expected = {name: tuple(t.shape) for name, t in release_tensors(model).items()}
    _check(path, expected, stored, optional, block)
    for name, found in stored.items():
        if name not in expected and name not in optional and name.removesuffix(SCALE_SUFFIX) not in expected:
            raise UserError(f"{found.path}: tensor {name} is unexpected; config.json describes another network")
    return CheckpointReader(model, stored, [name for name in expected if name not in optional], block)


def read_directory(path: Path) -> tuple[ModelConfig, ReleaseSettings, dict[str, TensorEntry]]:
    """Configuration, release settings and tensor entries of a directory. Raises UserError."""
    config = ModelConfig.load(path)
    released = ReleaseSettings.from_directory(path, config)
    stored = stored_tensors(path)
    if not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in stored):
        config = config.replace(num_nextn_predict_layers=0)
    return config, released, stored


def stored_tensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a directory, over all shards, without those that are ignored. Raises UserError."""
    index = path / INDEX
    if os.path.lexists(index):
        found = read_json(index)
        try:
            places = found["weight_map"]
            files = sorted(set(places.values()))
            if not all(word.isprintable() and "/" not in word for word in (*files, *places)):
                raise ValueError("a name in it is damaged")
            tensors = {name: t for file in files for name, t in read_header(path / file).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{index} is not a valid index ({e}); restore the file from its source") from None
        for name, file in places.items():
            if name not in tensors or tensors[name].path.name != file:
                raise UserError(f"{path / file}: tensor {name} is missing, though {INDEX} places it there")
    elif os.path.lexists(path / WEIGHTS):
        tensors = read_header(path / WEIGHTS)
    elif any(path.glob("pytorch_model*.bin")):
        raise UserError(
            f"{path} holds pickled weights (pytorch_model.bin), which can run code when read; convert them to "
            f"{WEIGHTS} with transformers' save_pretrained"
        )
    else:
        raise UserError(f"{path / WEIGHTS} does not exist; a model directory holds safetensors weights")
    # Old releases store RoPE tables; transformers writes shared experts of width 0 where there are none.
    return {name: t for name, t in tensors.items() if ".rotary_emb." not in name and 0 not in t.shape}


def _guard_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors whose presence bounds the cost of building the model, however damaged config.json is."""
    D, attention = config.hidden_size, "model.layers.0.self_attn"
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    shapes = {EMBEDDING: (config.vocab_size, D), f"model.layers.{layers - 1}.input_layernorm.weight": (D,)}
    if config.is_mla:
        mla = config.mla
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (mla.kv_lora_rank + mla.qk_rope_head_dim, D)
    else:
        gqa = config.gqa
        shapes[f"{attention}.k_proj.weight"] = (gqa.num_key_value_heads * gqa.head_dim, D)
    first = -(-config.first_k_dense_replace // config.moe_layer_freq) * config.moe_layer_freq
    if config.n_routed_experts and first < layers:
        shapes[f"model.layers.{first}.mlp.gate.weight"] = (config.n_routed_experts, D)
    return shapes


def _check(
    path: Path,
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, TensorEntry],
    optional: set[str],
    block: tuple[int, int],
) -> None:
    for name, shape in expected.items():
        if name not in stored:
            if name in optional:
                continue
            raise UserError(f"{path}: tensor {name} is missing; the files are incomplete or config.json is another's")
        found = stored[name]
        if found.shape != shape:
            raise UserError(
                f"{found.path}: tensor {name} has shape {list(found.shape)}, but config.json makes it {list(shape)}; "
                "use the config.json that belongs to these weights"
            )
        if not found.dtype.is_floating_point:
            raise UserError(f"{found.path}: tensor {name} holds {found.dtype} numbers, not weights; fetch it again")
        scale = stored.get(name + SCALE_SUFFIX)
        if found.dtype == torch.float8_e4m3fn and scale is None:
            raise UserError(f"{found.path}: tensor {name} is FP8 but {name + SCALE_SUFFIX} is missing")
        if scale is not None and (len(shape) != 2 or scale.shape != scale_shape(found.shape, block)):
            raise UserError(
                f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, which does not fit blocks of "
                f"{block[0]}×{block[1]} of {list(found.shape)}"
            )
