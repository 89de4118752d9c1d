"""The network, as the papers write it."""

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]
