"""Rorqual: pre-train, RL-tune and serve DeepSeek-style reasoning models, from a two-core CPU up."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rorqual import renamed_modules
from rorqual.processor import lower_torch

if TYPE_CHECKING:
    from rorqual.checkpoint.huggingface import load_model, save_model
    from rorqual.data.tokenizer import load_tokenizer
    from rorqual.model.config import ModelConfig

lower_torch()  # before anything here imports torch
renamed_modules.install()

__all__ = ["ModelConfig", "load_model", "load_tokenizer", "save_model"]

_HOMES = {
    "ModelConfig": "rorqual.model.config",
    "load_model": "rorqual.checkpoint.huggingface",
    "load_tokenizer": "rorqual.data.tokenizer",
    "save_model": "rorqual.checkpoint.huggingface",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import rorqual` and `rorqual --help` do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rorqual' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
