"""The model, written as in the DeepSeek papers."""

from typing import TYPE_CHECKING, Any

from rorqual.model.config import ModelConfig

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]


def __getattr__(name: str) -> Any:
    """The network on first use, so that plans from sizes alone do not wait for torch."""
    if name != "Transformer":
        raise AttributeError(f"module 'rorqual.model' has no attribute {name!r}")
    from rorqual.model.transformer import Transformer

    return Transformer
