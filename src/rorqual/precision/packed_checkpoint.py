"""Hugging Face directories with quantised weights in compressed-tensors format: the layout, and reading.

The format (`pack-quantized`: four or eight numbers to an int32, a scale for each output or for 32 inputs) is read by
transformers and vLLM too. Embedding and head are stored unquantised, and quantised on loading.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.checkpoint.model_reader import read_directory
from rorqual.checkpoint.release_tensors import meta_model, replace_weight
from rorqual.checkpoint.safetensors_io import TensorEntry
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.kernels.quantized_linear import GROUP, QuantizedWeight, pack
from rorqual.model import Transformer
from rorqual.model.layers import Linear
from rorqual.model.model_directory import read_json
from rorqual.model.moe import Experts
from rorqual.precision.quantize import ROUNDINGS, Bits, packable, replace_embedding, round_in_slices
from rorqual.process_tuning import release_memory

METHOD = "compressed-tensors"


def pack_tensors(q: Tensor, scales: Tensor, bits: Bits) -> dict[str, Tensor]:
    """q [N, K] and scales [N, ·] as the tensors that stand for a linear's weight, by the ends of their names."""
    per_byte = 2 if bits == "int4" else 1
    zero_point = 8 if bits == "int4" else 128
    data = nn.functional.pad(q, (0, -q.shape[1] % (4 * per_byte)), value=zero_point)
    if bits == "int4":
        data = data[:, ::2] | data[:, 1::2] << 4
    return {
        "weight_packed": data.contiguous().view(torch.int32),
        "weight_scale": scales.half() if bits == "int4" else scales,
        "weight_shape": torch.tensor(q.shape),
    }


def description(bits: Bits) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    group = {"strategy": "group", "group_size": GROUP} if bits == "int4" else {"strategy": "channel"}
    weights = {"num_bits": 4 if bits == "int4" else 8, "type": "int", "symmetric": True, "dynamic": False} | group
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*kv_b_proj", "re:.*mlp.gate$"],
    }


def is_quantized(path: Path) -> bool:
    """Whether a directory's config.json describes this format."""
    try:
        return read_json(path / "config.json")["quantization_config"]["quant_method"] == METHOD
    except (UserError, KeyError, TypeError):  # reported on loading
        return False


def load_packed(path: Path, dtype: torch.dtype | None = None) -> Transformer:
    """Read a directory that `rorqual quantize` wrote; `dtype`: of what is not quantised, by default the fastest.

    Raises UserError for other settings of the format, and for tensors that are missing or of wrong shape.
    """
    layout = read_json(path / "config.json")["quantization_config"]
    bits: Bits | None = next(
        (b for b in ROUNDINGS if layout.get("config_groups") == description(b)["config_groups"]), None
    )
    if bits is None or layout.get("format") != "pack-quantized":
        raise UserError(
            f"{path / 'config.json'}: quantization_config is not what `rorqual quantize` writes (4 bits with a scale "
            "for 32 or 8 bits with one for an output); quantise the original release"
        )
    config, released, stored = read_directory(path)
    # Checked before the model is built, since a damaged number of layers could make that endless.
    last = f"model.layers.{config.num_hidden_layers + config.num_nextn_predict_layers - 1}.input_layernorm.weight"
    if last not in stored:
        raise UserError(f"{path}: tensor {last} is missing; the files are incomplete or config.json is another's")
    reader = _Reader(path, stored, bits)
    model = meta_model(config)
    model.released = released
    dtype = dtype or fastest_dtype()
    for name, module in list(model.named_modules()):
        release_memory()  # of the previous module
        if isinstance(module, Experts):
            _load_experts(module, name, reader, dtype)
        elif isinstance(module, nn.Embedding):
            replace_embedding(model, reader.rounded(f"{name}.weight", module.weight, dtype))
        elif isinstance(module, Linear) and packable(module):
            if name == "lm_head":
                packed = reader.rounded(f"{name}.weight", module.weight, dtype)
            else:
                packed = pack_numbers([reader.packed(name, module.weight)], bits, dtype)
            if module.bias is not None:
                module.bias = nn.Parameter(reader.plain(f"{name}.bias", module.bias).to(dtype))
            replace_weight(module, "weight", packed)
        else:
            for own, p in list(module.named_parameters(recurse=False)):
                setattr(module, own, nn.Parameter(reader.plain(f"{name}.{own}", p).to(dtype)))
            for own, b in list(module.named_buffers(recurse=False)):
                setattr(module, own, reader.plain(f"{name}.{own}", b).to(b.dtype))
    return model


def _load_experts(module: Experts, name: str, reader: "_Reader", dtype: torch.dtype) -> None:
    up, down = module.gate_up_proj.shape, module.down_proj.shape
    half = torch.empty(up[1] // 2, up[2], device="meta")
    whole = torch.empty(*down[1:], device="meta")
    gates, downs = [], []
    for e in range(up[0]):
        pair = [reader.packed(f"{name}.{e}.{part}", half) for part in ("gate_proj", "up_proj")]
        gates.append(tuple(torch.cat(parts) for parts in zip(*pair, strict=True)))
        downs.append(reader.packed(f"{name}.{e}.down_proj", whole))
    for parameter, parts in (("gate_up_proj", gates), ("down_proj", downs)):
        replace_weight(module, parameter, pack_numbers(parts, reader.bits, dtype))


def pack_numbers(parts: list[tuple[Tensor, Tensor]], bits: Bits, dtype: torch.dtype) -> QuantizedWeight:
    """Pack q [N, K] and scales [N, ·] of every expert."""
    packed = pack(bits, torch.stack([q for q, _ in parts]), torch.stack([s for _, s in parts]))
    packed.dtype = dtype
    return packed


class _Reader:
    """Reads the tensors of a directory, with checks of presence and shape."""

    def __init__(self, path: Path, stored: dict[str, TensorEntry], bits: Bits) -> None:
        self.path, self.stored = path, stored
        self.bits: Bits = bits

    def find(self, name: str, like: Tensor | None = None) -> TensorEntry:
        found = self.stored.get(name)
        if found is None:
            raise UserError(f"{self.path}: tensor {name} is missing; the files are incomplete")
        if like is not None and found.shape != tuple(like.shape):
            raise UserError(
                f"{found.path}: tensor {name} has shape {list(found.shape)}, but config.json makes it "
                f"{list(like.shape)}; use the config.json that belongs to these weights"
            )
        return found

    def plain(self, name: str, like: Tensor) -> Tensor:
        return self.find(name, like).rows()

    def rounded(self, name: str, like: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """A tensor stored unquantised, quantised."""
        found = self.find(name, like)
        N, K = found.shape
        packed = round_in_slices(lambda _, first, last: found.rows(first, last).to(dtype), (1, N, K), self.bits)
        packed.dtype = dtype
        return packed

    def packed(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A linear's q uint8 [N, K] and scales [N, ·]."""
        N, K = like.shape
        per_word = 8 if self.bits == "int4" else 4
        words = torch.empty(N, -(-K // per_word), device="meta")
        data = self.plain(f"{name}.weight_packed", words).view(torch.uint8)
        scales = self.plain(
            f"{name}.weight_scale", torch.empty(N, -(-K // GROUP) if self.bits == "int4" else 1, device="meta")
        )
        if self.bits == "int4":
            data = torch.stack([data & 15, data >> 4], dim=-1).flatten(1)
        return data[:, :K], scales
