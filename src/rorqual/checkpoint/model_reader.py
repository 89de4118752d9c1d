"""Read the tensors of a model directory: shards, index, FP8 blocks; checked before any weight is read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from rorqual.checkpoint.fp8_blocks import SCALE_DTYPES, SCALE_SUFFIX, block_format, round_weight
from rorqual.checkpoint.release_tensors import (
    EMBEDDING,
    NetworkT,
    allocate,
    meta_model,
    own_tensors,
    release_tensors,
    shared_copies,
)
from rorqual.checkpoint.safetensors_io import CHUNK_BYTES, INDEX, WEIGHTS, TensorEntry, read_header
from rorqual.errors import UserError
from rorqual.kernels.block_scaled import decode
from rorqual.kernels.number_formats import NumberFormat
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import model_directory, read_json
from rorqual.model.release_settings import ReleaseSettings
from rorqual.model.reward_model import RewardModel, is_reward_model
from rorqual.model.transformer import Layer, Transformer


@dataclass
class CheckpointReader(Generic[NetworkT]):
    """Reads the tensors of a checked directory."""

    outline: NetworkT  # on the meta device
    stored: dict[str, TensorEntry]
    required: list[str]  # names of the model's tensors, each once
    format: NumberFormat  # of FP8 weights with a scale

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a tensor as stored; FP8 weights dequantised."""
        found = self.stored[name]
        last = found.shape[0] if last is None else min(last, found.shape[0])
        if name + SCALE_SUFFIX not in self.stored:
            return found.rows(first, last)
        format = self.format.within(*found.shape)  # however large config.json says
        begin = first // format.tile[0] * format.tile[0]
        codes, scales = found.rows(begin, last), self._scales(name, begin, last)
        return decode(codes.view(torch.uint8), scales.float(), format, found.shape[1])[first - begin :]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read the named tensors into the given memory, a chunk of rows at a time.

        A weight whose scales are among them is kept in FP8 as it is stored, or rounded to it.
        """
        names = (name for name in tensors if not name.endswith(SCALE_SUFFIX))
        for name in sorted(names, key=lambda name: self.stored[name].path):
            found, scales = self.stored[name], tensors.get(name + SCALE_SUFFIX)
            height = 1 if scales is None else min(self.format.tile[0], found.shape[0])
            rows = max(1, CHUNK_BYTES // max(1, found.row_bytes * height)) * height
            for first in range(0, found.shape[0], rows):
                last = min(first + rows, found.shape[0])
                if scales is None:
                    tensors[name][first:last].copy_(self.rows(name, first, last))
                else:
                    codes, own = self._blocks(name, first, last)
                    tensors[name][first:last].copy_(codes)
                    scales[first // height : -(-last // height)].copy_(own)

    def _blocks(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last), which begin with a block, in E4M3, and the scales of their blocks."""
        if name + SCALE_SUFFIX in self.stored:
            return self.stored[name].rows(first, last), self._scales(name, first, last)
        return round_weight(self.rows(name, first, last), self.format)

    def _scales(self, name: str, first: int, last: int) -> Tensor:
        """The scales of the blocks of rows [first, last) of a weight, as stored. Raises UserError for damaged ones."""
        found, height = self.stored[name + SCALE_SUFFIX], min(self.format.tile[0], self.stored[name].shape[0])
        scales = found.rows(first // height, -(-last // height))
        wide = scales.float()
        if not (wide.isfinite() & (wide > 0)).all():
            raise UserError(f"{found.path}: tensor {found.name} holds a scale that is not above 0; fetch it again")
        return scales

    def layer(self, index: int) -> Layer:
        """One of the main network's layers in FP32."""
        with torch.device("meta"):
            layer = Layer(self.outline.config, index)
        allocate(layer, torch.float32, "cpu")
        self.fill(own_tensors(layer, f"model.layers.{index}"))
        return layer


def open_release(path: Path, network: type[NetworkT] = Transformer) -> CheckpointReader[NetworkT]:
    """Check a directory before weights are read. Raises UserError, also where it holds another kind of network."""
    path = model_directory(path)
    config, released, stored = read_directory(path)
    if is_reward_model(path) != issubclass(network, RewardModel):
        kinds = "a language model", "a reward model"
        found, wanted = kinds if issubclass(network, RewardModel) else kinds[::-1]
        raise UserError(f"{path} is {found} (architectures in its config.json); give {wanted}")
    format = block_format(read_json(path / "config.json"), str(path / "config.json"))
    _check(path, _guard_shapes(config), stored, set(), format)
    model = meta_model(config, network)
    model.released = released
    optional = set(shared_copies(model))
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    expected = {name: tuple(t.shape) for name, t in release_tensors(model).items()}
    _check(path, expected, stored, optional, format)
    for name, found in stored.items():
        if name not in expected and name not in optional and name.removesuffix(SCALE_SUFFIX) not in expected:
            raise UserError(f"{found.path}: tensor {name} is unexpected; config.json describes another network")
    return CheckpointReader(model, stored, [name for name in expected if name not in optional], format)


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
    format: NumberFormat,
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
        if (found.dtype == torch.float8_e4m3fn) != (scale is not None):
            raise UserError(
                f"{found.path}: tensor {name} is FP8 but {name + SCALE_SUFFIX} is missing; the files are incomplete"
                if scale is None
                else f"{found.path}: tensor {name} has scales but holds {found.dtype} numbers, not E4M3; fetch it again"
            )
        if scale is not None:
            _check_scale(found, scale, format)


def _check_scale(weight: TensorEntry, scale: TensorEntry, format: NumberFormat) -> None:
    if len(weight.shape) != 2 or scale.shape != format.tiles(*weight.shape):
        raise UserError(
            f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, which does not fit blocks of "
            f"{format.tile[0]}×{format.tile[1]} of {list(weight.shape)}; use the config.json that belongs to it"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(
            f"{scale.path}: tensor {scale.name} holds {scale.dtype} numbers, but scales are FP32, BF16, FP16 or E8M0; "
            "fetch it again"
        )
