"""The model, written as in the DeepSeek papers."""

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]
