"""What a released model says beside its weights, of whatever form it is."""

from pathlib import Path

from rorqual.checkpoint.gguf_import import described
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.model.release_settings import ReleaseSettings


def read_released(path: str | Path) -> ReleaseSettings:
    """Of a directory, a run's folder or a .gguf file. Raises UserError for what cannot be read, or wrong values."""
    if is_gguf(path):
        return described(path)
    directory = model_directory(path)
    return ReleaseSettings.from_directory(directory, ModelConfig.load(directory))
