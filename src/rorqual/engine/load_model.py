"""A model and its tokenizer from what a user names."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rorqual.checkpoint.huggingface import load_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model import Transformer
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.precision.packed_checkpoint import load_packed, packed_already
from rorqual.precision.quantize import Bits, load_converted
from rorqual.process_tuning import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", weights: Bits | None = None
) -> tuple[Transformer, "PreTrainedTokenizerFast"]:
    """A Hugging Face directory or a run's folder, its `weights` packed into so many bits; packed ones and .gguf files
    stay as they are.

    `dtype`, by default what `device` computes fastest, is that of what is not packed, and so of the KV cache.
    Raises UserError for what cannot be read, and for a device that is not there or takes no packed weights.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no GPU here; leave it out to compute on the CPU")
    if is_gguf(path):
        _check_packed_on(device)
        from rorqual.precision.gguf_weights import load_gguf

        return load_gguf(path, dtype)
    path = model_directory(path)
    tokenizer = load_tokenizer(path)
    release_memory()
    if packed_already(path):
        _check_packed_on(device)
        return load_packed(path, dtype), tokenizer
    if weights is None:
        try:
            return load_model(path, dtype or fastest_dtype(device), device), tokenizer
        except torch.OutOfMemoryError:
            raise UserError(f"device {device}: no memory for the weights of {path}; try bfloat16 or the CPU") from None
    _check_packed_on(device)
    return load_converted(path, weights, dtype or fastest_dtype()), tokenizer


def _check_packed_on(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        raise UserError(
            f"device {device}: packed weights are for a CPU; leave out --weights, and give a directory not packed"
        )
