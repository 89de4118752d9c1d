"""Reads a pipeline: a TOML file with a table for each stage, from text to a served model.

name = "tiny-r1"
out = "runs/tiny-r1"               # folder of all stages' runs; left out: each recipe's own
gpu = "h100"                       # of stages that say no other; so price and gpus

[[stage]]
recipe = "pretrain-tiny.toml"      # relative to this file

[[stage]]
name = "reasoning"                 # the run's; left out: the recipe's
recipe = "rl-tiny.toml"
model = "pretrain-tiny"            # what it goes on with: a stage before, or a model's directory, with a / in it;
                                   # so teacher, reward_model, and mix = [...]

[[stage]]
for = "rl"
model = "deepseek-v3"              # left out: the model of the stage before
steps = 500

[evaluate]                         # for `rorqual r1`: after each stage, see rorqual.pipeline.evaluation
tasks = "recipes/rl-tiny.toml"
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.files import read_text
from rorqual.local_paths import local_path

COMMON = ("gpu", "gpus", "price")
SEED_STEP = 1000  # between stages, so that each draws its own problems
# Fields of a stage that name a stage before it, and the recipe's fields that then become its model's directory.
LINKS = {"model": "model.path", "teacher": "teacher", "reward_model": "reward.model.path"}
MIX = "mix"  # so does this, a list of distillations, whose samples become the paths of [[mix]]


@dataclass(frozen=True)
class Stage:
    """Fields of a request, or a recipe with what a plan adds to it."""

    where: str  # such as "plan.toml: stage 2"
    fields: dict[str, Any]
    kind: str | None = None  # of a request
    recipe: Path | None = None
    name: str = ""  # of a recipe's run
    overrides: list[str] = field(default_factory=list[str])  # of the recipe


@dataclass(frozen=True)
class PipelineFile:
    name: str
    stages: tuple[Stage, ...]
    out: Path | None = None
    evaluate: dict[str, Any] | None = None


def is_pipeline(path: Path) -> bool:
    """Whether a TOML file has stages, and so is no recipe. Raises UserError for what is not TOML."""
    return "stage" in read_toml(path)


def pipeline_at(path: Path, out: Path | None = None, seed: int | None = None) -> tuple[PipelineFile, Path]:
    """The pipeline and the folder that it runs in: `out`, else the file's, else runs/NAME. Raises UserError."""
    file = read_pipeline(path)
    out = out or file.out or Path("runs") / file.name
    return read_pipeline(path, out, seed), out


def read_pipeline(path: Path, out: Path | None = None, seed: int | None = None) -> PipelineFile:
    """`out` of all stages and `seed` of the first, of each next one SEED_STEP more, instead of the file's and the
    recipes'. Raises UserError.
    """
    raw = read_toml(path)
    if "stage" not in raw:
        raise UserError(
            f"{path} has no [[stage]], so it is no pipeline's file; give one, or run the recipe by its verb"
        )
    stages, name, evaluate = raw.pop("stage"), raw.pop("name", path.stem), raw.pop("evaluate", None)
    said = raw.pop("out", None)
    common = {key: raw.pop(key) for key in COMMON if key in raw}
    if raw:
        known = f"name, out, {', '.join(COMMON)}, stage and evaluate"
        raise UserError(f"{path}: field {next(iter(raw))} is unknown; known are {known}")
    if not isinstance(name, str) or not isinstance(stages, list) or not stages:
        raise UserError(f"{path}: a pipeline has a name and a [[stage]] for each of its stages")
    if not isinstance(said, str | None) or not isinstance(evaluate, dict | None):
        raise UserError(f"{path}: out is a folder's name, and evaluate a table")
    out = out or (Path(local_path(said)) if said else None)
    models: dict[str, Path] = {}
    found = tuple(_stage(path, i, common, fields, out, seed, models) for i, fields in enumerate(stages, 1))
    return PipelineFile(name, found, out, evaluate)


def _stage(
    path: Path,
    number: int,
    common: dict[str, Any],
    given: Any,
    out: Path | None,
    seed: int | None,
    models: dict[str, Path],
) -> Stage:
    """`models`: directories that the stages before write, by name; this one's is added."""
    where = f"{path}: stage {number}"
    if not isinstance(given, dict):
        raise UserError(f"{where}: must be a table, [[stage]]")
    fields = common | given
    recipe, kind = fields.pop("recipe", None), fields.pop("for", None)
    if (recipe is None) == (kind is None) or not isinstance(recipe or kind, str):
        raise UserError(f'{where}: say either its recipe, or what it is for, such as for = "pretrain"')
    if recipe is None:
        return Stage(where, fields, kind)
    file = path.parent / recipe
    raw = read_toml(file)
    name = str(fields.pop("name", raw.get("name", file.stem)))
    if name in models:
        raise UserError(f"{where}: a stage before is named {name!r} too; give this one another name")
    folder = out or Path(str(raw.get("out", "runs")))
    own_seed = None if seed is None else seed + SEED_STEP * (number - 1)
    own = {"name": name, "out": out, "seed": own_seed}
    overrides = [f"{key}={value}" for key, value in own.items() if value is not None]
    for link, target in LINKS.items():
        if link in fields:
            before = fields.pop(link)
            if before not in models and not (isinstance(before, str) and "/" in before):
                known = ", ".join(models) or "none"
                raise UserError(
                    f"{where}: {link} = {before!r} is no stage before it ({known}), nor a model's directory, which has "
                    "a / in it; correct it"
                )
            overrides.append(f"{target}={models.get(before, before)}")
    overrides += _mixed(where, fields.pop(MIX, []), models)
    inner = "student/model" if recipe_kind(file) == "distill" else "model"
    models[name] = folder / name / inner
    return Stage(where, fields, recipe=file, name=name, overrides=overrides)


def _mixed(where: str, given: Any, models: dict[str, Path]) -> list[str]:
    """Overrides with the samples of the distillations that are named, and files."""
    known = {
        name: model.parents[1] / "samples.jsonl"
        for name, model in models.items()
        if model.parts[-3:-1] == (name, "student")
    }
    found: list[str] = []
    for i, name in enumerate(given if isinstance(given, list) else [given]):
        if not isinstance(name, str) or (name not in known and "/" not in name):
            distillations = ", ".join(known) or "none"
            raise UserError(
                f"{where}: mix = {name!r} is no distillation before it ({distillations}), nor a file, which has a / in "
                "it; correct it"
            )
        found.append(f"mix.{i}.path={known.get(name, name)}")
    return found


def recipe_kind(path: Path) -> str:
    """Of a recipe, which may leave it to the command that runs it. Raises UserError."""
    raw = read_toml(path)
    if isinstance(raw.get("kind"), str):
        return raw["kind"]
    data = raw.get("data")
    of_field = {"teacher": "distill", "environments": "rl", "pairs": "reward"}
    found = [kind for name, kind in of_field.items() if name in raw]
    return found[0] if found else "sft" if isinstance(data, dict) and "path" in data else "pretrain"


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UserError."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a recipe, or a file with the stages of a pipeline") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
