"""Reads a pipeline: a TOML file with a table for each stage, from text to a served model.

name = "tiny-r1"
gpu = "h100"                       # of stages that say no other; so price and gpus

[[stage]]
recipe = "pretrain-tiny.toml"      # relative to this file

[[stage]]
for = "rl"
model = "deepseek-v3"              # left out: the model of the stage before
steps = 500
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.files import read_text

COMMON = ("gpu", "gpus", "price")


@dataclass(frozen=True)
class Stage:
    """Fields of a request, or a recipe with what a plan adds to it."""

    where: str  # such as "plan.toml: stage 2"
    fields: dict[str, Any]
    kind: str | None = None  # of a request
    recipe: Path | None = None


@dataclass(frozen=True)
class PipelineFile:
    name: str
    stages: tuple[Stage, ...]


def is_pipeline(path: Path) -> bool:
    """Whether a TOML file has stages, and so is no recipe. Raises UserError for what is not TOML."""
    return "stage" in read_toml(path)


def read_pipeline(path: Path) -> PipelineFile:
    """Raises UserError."""
    raw = read_toml(path)
    stages, name = raw.pop("stage"), raw.pop("name", path.stem)
    common = {key: raw.pop(key) for key in COMMON if key in raw}
    if raw:
        raise UserError(f"{path}: field {next(iter(raw))} is unknown; known are name, {', '.join(COMMON)} and stage")
    if not isinstance(name, str) or not isinstance(stages, list) or not stages:
        raise UserError(f"{path}: a pipeline has a name and a [[stage]] for each of its stages")
    return PipelineFile(name, tuple(_stage(path, i, common, fields) for i, fields in enumerate(stages, 1)))


def _stage(path: Path, number: int, common: dict[str, Any], given: Any) -> Stage:
    where = f"{path}: stage {number}"
    if not isinstance(given, dict):
        raise UserError(f"{where}: must be a table, [[stage]]")
    fields = common | given
    recipe, kind = fields.pop("recipe", None), fields.pop("for", None)
    if (recipe is None) == (kind is None) or not isinstance(recipe or kind, str):
        raise UserError(f'{where}: say either its recipe, or what it is for, such as for = "pretrain"')
    if recipe is not None:
        return Stage(where, fields, recipe=path.parent / recipe)
    return Stage(where, fields, kind)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UserError."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a recipe, or a file with the stages of a pipeline") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
