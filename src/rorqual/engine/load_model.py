"""Load a model and its tokenizer from a directory or file."""

from pathlib import Path
from typing import Literal

import torch

from rorqual.adapters.lora import merge
from rorqual.adapters.peft_files import base_of, is_adapter, read_adapter
from rorqual.checkpoint.huggingface import load_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.devices import check_device
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model import Transformer
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.precision.packed_checkpoint import is_quantized, load_packed
from rorqual.precision.quantize import Bits, convert, load_converted
from rorqual.process_tuning import release_memory
from rorqual.tokenizer_protocol import Tokenizer

Weights = Bits | Literal["fp8"]


def open_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    adapter: str | Path | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load a Hugging Face directory, a run's folder or a .gguf file.

    `weights`: quantise on loading; ignored where weights are quantised already, but an FP8 release can be had as int4
    or int8 too, and stays FP8 with "fp8" only. `dtype`, by default the fastest on `device`: of weights that are not
    quantised, and so of the KV cache. `adapter`: a directory in peft's layout, merged before weights are quantised; a
    directory that holds only an adapter stands for its base with it.

    Raises UserError for what cannot be read, for a missing device, and for quantised weights on a GPU.
    """
    check_device(device)
    if adapter is None and is_adapter(path):
        path, adapter = base_of(path), path
    if adapter is not None:
        return _open_adapted(path, adapter, dtype, device, weights)
    if is_gguf(path):
        _check_on_cpu(device)
        from rorqual.precision.gguf_weights import load_gguf

        return load_gguf(path, dtype)
    path = model_directory(path)
    tokenizer = load_tokenizer(path)
    release_memory()
    if is_quantized(path):
        _check_on_cpu(device)
        return load_packed(path, dtype), tokenizer
    if weights is not None:
        _check_on_cpu(device)
    if weights is None or weights == "fp8":
        try:
            return load_model(path, dtype or fastest_dtype(device), device, weights), tokenizer
        except torch.OutOfMemoryError:
            raise UserError(f"device {device}: no memory for the weights of {path}; try bfloat16 or the CPU") from None
    return load_converted(path, weights, dtype or fastest_dtype()), tokenizer


def _open_adapted(
    path: str | Path,
    adapter: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    weights: Weights | None,
) -> tuple[Transformer, Tokenizer]:
    found = read_adapter(adapter)
    if is_gguf(path) or is_quantized(path := model_directory(path)) or weights == "fp8":
        raise UserError(
            f"adapter {adapter}: it is merged into weights that are not quantised; give such a model, or merge it "
            "first: rorqual import ADAPTER DIRECTORY"
        )
    if not path.exists():
        raise UserError(f"adapter {adapter}: its model {path} is not here; give the model, and --adapter {adapter}")
    if weights is not None:
        _check_on_cpu(device)
    model, tokenizer = open_model(path, dtype, device)
    merge(model, found.updates)
    return (model if weights is None else convert(model, weights)), tokenizer


def _check_on_cpu(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        raise UserError(
            f"device {device}: quantised weights are for a CPU; leave out --weights, and give a model not quantised"
        )
