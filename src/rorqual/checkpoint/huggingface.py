"""Load and save a model as a Hugging Face directory: config.json, *.safetensors, generation_config.json, tokenizer."""

from pathlib import Path
from typing import Any, Literal

import torch

from rorqual import strict_json
from rorqual.checkpoint.fp8_blocks import (
    BLOCK_FORMATS,
    SCALE_SUFFIX,
    ScaleFormat,
    quantization_config,
    round_to_blocks,
)
from rorqual.checkpoint.fp8_loading import allocate_fp8
from rorqual.checkpoint.model_reader import open_release
from rorqual.checkpoint.model_writer import MAX_SHARD_BYTES, new_directory, write_json, write_tokenizer, write_weights
from rorqual.checkpoint.release_tensors import EMBEDDING, allocate, fp8_weights, release_tensors
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model.model_directory import model_directory, read_json
from rorqual.model.parameter_kinds import is_converted
from rorqual.model.release_settings import GENERATION
from rorqual.model.reward_model import RewardModel
from rorqual.model.transformer import Transformer
from rorqual.tokenizer_protocol import Tokenizer


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: Literal["fp8"] | None = None,
) -> Transformer:
    """Read a Hugging Face directory (or a run's folder) of a supported architecture, a chunk of rows at a time.

    `dtype` defaults to FP32 if the weights are stored so, else to the fastest on `device` (kernels/dtypes.py);
    `stored_dtype` gives the stored one. Block-scaled FP8 weights are dequantised; with `weights` = "fp8" they stay as
    they are stored, for inference, and the linears of other models are rounded to blocks of 128 × 128. Multi-token
    modules in config.json but not in the files (transformers drops them on saving) are left out. Raises UserError
    naming the file and the tensor that is missing, unexpected, of wrong shape or truncated.
    """
    release = open_release(Path(path))
    model = release.outline
    if dtype is None:
        stored = release.stored[EMBEDDING].dtype
        dtype = stored if stored is torch.float32 else fastest_dtype(device)
    if weights == "fp8":
        allocate_fp8(release, device)
    allocate(model, dtype, device)
    required = set(release.required)
    release.fill({name: t for name, t in release_tensors(model).items() if name.removesuffix(SCALE_SUFFIX) in required})
    return model


def load_reward_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardModel:
    """As `load_model`, for a reward model (`…ForSequenceClassification`, one label). Raises UserError for others."""
    release = open_release(Path(path), RewardModel)
    model = release.outline
    allocate(model, dtype or release.stored[EMBEDDING].dtype, device)
    own = release_tensors(model)
    release.fill({name: own[name] for name in release.required})
    settings = read_json(model_directory(path) / "config.json")
    for name in ("score_mean", "score_std"):
        value = settings.get(name, getattr(model, name))
        if not strict_json.is_finite(value) or (name == "score_std" and value <= 0):
            raise UserError(f"{path}/config.json: {name} = {value!r:.60} must be a number, and score_std above 0")
        setattr(model, name, float(value))
    return model


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that holds a directory's weights without loss: the stored embedding's; BF16 for FP8 and others."""
    stored = open_release(Path(path)).stored[EMBEDDING].dtype
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16


def save_model(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fp8: ScaleFormat | None = None,
) -> None:
    """Write a Hugging Face directory that transformers and vLLM load too; each tensor in its own dtype.

    FP8 weights are written as they were read. `fp8` rounds the linears of other models to FP8 in blocks of 128 × 128,
    with scales in FP32 ("fp32", V3) or scales that are powers of two ("ue8m0", V3.1).

    A new directory appears complete or not at all. In an existing one, files are replaced atomically one by one, and
    files of other names stay. Raises UserError if it cannot be written, with nothing changed.
    """
    tensors, config = release_tensors(model), model.config_dict()
    format = next((weight.format for _, weight in fp8_weights(model)), None)
    if fp8 is not None:
        if format is not None:
            raise UserError(f"fp8 = {fp8!r}: the model's weights are in FP8 already; leave it out")
        tensors, format = round_to_blocks(tensors, fp8), BLOCK_FORMATS[fp8]
    if format is not None:
        config["quantization_config"] = quantization_config(tensors, format)
    with new_directory(Path(path), "saved") as temporary:
        write_settings(model, temporary, tokenizer, config)
        write_weights(tensors, temporary, max_shard_bytes)


def write_settings(
    model: Transformer, folder: Path, tokenizer: Tokenizer | None, config: dict[str, Any] | None = None
) -> None:
    """All of a directory but the weights; `config`: what config.json says, where it is not the model's."""
    stored = next(p for name, p in model.named_parameters() if is_converted(name, p)).dtype
    config = (config or model.config_dict()) | {"torch_dtype": str(stored).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    write_json(folder / GENERATION, model.released.generation_config(model.config, tokenizer))
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
