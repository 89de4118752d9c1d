"""A model is a Hugging Face directory: config.json, *.safetensors, generation_config.json and a tokenizer.

Tensor names are the releases'. In memory the routed experts of a layer are stacked, and multi-token modules share
embedding and head with the main model; on disk every expert has its own tensors and every module its copies.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.checkpoint.fp8_blocks import SCALE_SUFFIX, block_size, expand, scale_shape
from rorqual.checkpoint.safetensors_io import CHUNK_BYTES, TensorEntry, read_header, write_shard
from rorqual.errors import UserError, file_error
from rorqual.files import force_to_disk, write_folder
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import model_directory, read_json
from rorqual.model.release_settings import GENERATION, ReleaseSettings
from rorqual.model.transformer import Layer, Transformer
from rorqual.tokenizer_protocol import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
# Files besides weights and config.json, copied unchanged.
COMPANION_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", GENERATION,
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a directory of named templates


def release_tensors(model: Transformer) -> dict[str, Tensor]:
    """Release name → tensor; experts are views of their stack, shared tensors appear twice."""
    return _own_tensors(model) | _shared_copies(model)


def _own_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
        tensor = tensor.detach()
        layer, _, stack = name.rpartition(".experts.")
        if stack == "gate_up_proj":
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                out[f"{layer}.experts.{e}.gate_proj.weight"] = gate
                out[f"{layer}.experts.{e}.up_proj.weight"] = up
        elif stack == "down_proj":
            out |= {f"{layer}.experts.{e}.down_proj.weight": expert for e, expert in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def _shared_copies(model: Transformer) -> dict[str, Tensor]:
    depth, mtp_depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    embedding, head = model.model.embed_tokens.weight.detach(), model.head_weight.detach()
    copies = {}
    for layer in range(depth, depth + mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def meta_model(config: ModelConfig) -> Transformer:
    """The model on the meta device. Raises UserError for impossible sizes."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError) as e:  # more numbers than 64 bits can count
        raise UserError(f"sizes in the configuration are too large ({str(e).splitlines()[0]}); correct them") from None


def allocate(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate uninitialised memory for a module on the meta device: parameters in `dtype`, buffers in their own."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(p, dtype=dtype, device=device)))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(b, device=device))


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
        self.fill(_own_tensors(layer, f"model.layers.{index}"))
        return layer


def open_release(path: Path) -> CheckpointReader:
    """Check a directory before weights are read. Raises UserError."""
    path = model_directory(path)
    config, released, stored = read_directory(path)
    raw = read_json(path / "config.json")
    if not isinstance(raw.get("quantization_config"), dict | None):
        raise UserError(f"{path / 'config.json'}: quantization_config must be an object; restore the file")
    block = block_size(raw, str(path / "config.json"))
    _check(path, _guard_shapes(config), stored, set(), block)
    model = meta_model(config)
    model.released = released
    optional = set(_shared_copies(model))
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


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """Read a Hugging Face directory (or a run's folder) of a supported architecture, a chunk of rows at a time.

    `dtype` defaults to FP32 if the weights are stored so, else to the fastest on `device` (kernels/dtypes.py);
    `stored_dtype` gives the stored one. Block-scaled FP8 weights are dequantised. Multi-token modules in config.json
    but not in the files (transformers drops them on saving) are left out. Raises UserError naming the file and the
    tensor that is missing, unexpected, of wrong shape or truncated.
    """
    release = open_release(Path(path))
    model = release.outline
    if dtype is None:
        stored = release.stored[EMBEDDING].dtype
        dtype = stored if stored is torch.float32 else fastest_dtype(device)
    allocate(model, dtype, device)
    tensors = release_tensors(model)
    release.fill({name: tensors[name] for name in release.required})
    return model


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that holds a directory's weights without loss: the stored embedding's; BF16 for FP8 and others."""
    stored = open_release(Path(path)).stored[EMBEDDING].dtype
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16


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
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (
            config.kv_lora_rank + config.qk_rope_head_dim,
            D,
        )
    else:
        shapes[f"{attention}.k_proj.weight"] = (config.num_key_value_heads * config.head_dim, D)
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


def save_model(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face directory that transformers and vLLM load too; each tensor in its own dtype.

    A new directory appears complete or not at all. In an existing one, files are replaced atomically one by one, and
    files of other names stay. Raises UserError if it cannot be written, with nothing changed.
    """
    path = Path(path)
    try:
        with write_folder(path, move_into_place) as folder:
            _write_configs(model, folder, tokenizer)
            write_weights(release_tensors(model), folder, max_shard_bytes)
            if tokenizer is not None:
                _write_tokenizer(tokenizer, folder)
    except OSError as e:
        raise file_error(path, e, "saved", "or choose another directory") from e


def _write_configs(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> None:
    config = model.config
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    write_json(path / "config.json", config.to_dict() | {"torch_dtype": dtype})
    write_json(path / GENERATION, model.released.generation_config(config, tokenizer))


def copy_companions(source: Path, dest: Path) -> None:
    """Copy tokenizer, templates and generation config unchanged."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, dest / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, dest / TEMPLATES, dirs_exist_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(tensors: dict[str, Tensor], path: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    if len(shards) == 1:
        write_shard(path / WEIGHTS, shards[0])
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    try:
        tokenizer.save_pretrained(str(path))
        # transformers 5 writes the name of a class that 4 does not know; both know this one.
        config = path / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    except Exception as e:  # the Rust side reports a full disk as a bare Exception
        raise OSError(str(e)) from e


def move_into_place(folder: Path, path: Path) -> None:
    """`move` of files.write_folder for a model's directory: in an existing one, replace file by file."""
    if not path.exists():
        folder.rename(path)
        return
    new = {file.name for file in folder.iterdir()}
    old = {INDEX, *(file.name for file in path.glob("model*.safetensors"))}
    for name in sorted(new, key=lambda n: n == INDEX):  # the index last, after the shards that it names
        if (path / name).is_dir():  # the templates'
            shutil.rmtree(path / name)
        os.replace(folder / name, path / name)
    for name in old - new:  # shards of a former layout
        (path / name).unlink(missing_ok=True)
    force_to_disk(path)
