"""The models that plans are made for: known names, a config.json, or a model's directory."""

import tomllib
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import read_json

# Released under a name of their own with the sizes of another.
SAME_SIZES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-r1-zero": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "r1-distill-qwen-1.5b": "qwen2.5-1.5b",
    "r1-distill-qwen-7b": "qwen2.5-7b",
    "r1-distill-qwen-14b": "qwen2.5-14b",
    "r1-distill-qwen-32b": "qwen2.5-32b",
    "r1-distill-llama-8b": "llama-3.1-8b",
    "r1-distill-llama-70b": "llama-3.1-70b",
}


@cache
def _sizes() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("rorqual.plan").joinpath("models.toml").read_text())


def known_models() -> list[str]:
    return sorted([*_sizes(), *SAME_SIZES])


def find_model(what: str) -> ModelConfig:
    """Of a known name, a config.json or a model's directory. Raises UserError for anything else."""
    name = SAME_SIZES.get(what.lower(), what.lower())
    if name in _sizes():
        return ModelConfig(**_sizes()[name])
    path = Path(what)
    if path.is_dir():
        return ModelConfig.load(path)
    if path.is_file():
        return ModelConfig.from_dict(read_json(path), str(path))
    near = get_close_matches(what.lower(), known_models(), 1)
    meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known_models())}"
    raise UserError(f"{what} is neither a model's directory nor a known model; {meant}")
