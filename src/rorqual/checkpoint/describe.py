"""Release settings of a model in any format."""

from pathlib import Path

from rorqual.checkpoint.gguf_import import read_release_settings
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.model.release_settings import ReleaseSettings


def read_released(path: str | Path) -> ReleaseSettings:
    """Settings of a directory, a run's folder or a .gguf file. Raises UserError for unreadable or invalid files."""
    if is_gguf(path):
        return read_release_settings(path)
    directory = model_directory(path)
    return ReleaseSettings.from_directory(directory, ModelConfig.load(directory))
