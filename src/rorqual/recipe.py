"""Recipes: the typed settings of a run, validated before it starts.

A recipe is one TOML file; `key=value` arguments override its fields (`train.steps=100`). The resolved recipe is saved
with the run.
"""

import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_origin, overload

from pydantic import BaseModel, ValidationError

from rorqual.errors import UserError
from rorqual.files import read_text
from rorqual.local_paths import local_path
from rorqual.recipe_kinds import (
    WORKED_SOLUTIONS,
    DistillRecipe,
    FineTuningRecipe,
    PretrainRecipe,
    Recipe,
    RewardRecipe,
    RLRecipe,
    SFTRecipe,
)
from rorqual.renamed import current_fields
from rorqual.rl_sections import (
    EnvironmentSection,
    FilterSection,
    GRPOSection,
    MixSection,
    OPDSection,
    RewardModelSection,
    RewardSection,
    RolloutsSection,
)
from rorqual.sections import (
    BalanceSection,
    ChatDataSection,
    DataSection,
    LoRASection,
    ModelSection,
    MTPSection,
    OptimizerSection,
    PairDataSection,
    PairsSection,
    ParallelSection,
    PolicyMTPSection,
    ScheduleSection,
    Source,
    SpikesSection,
    TokenizerSection,
    TomlValue,
    TrainSection,
)
from rorqual.unicode_checks import whole

__all__ = [
    "WORKED_SOLUTIONS",
    "BalanceSection",
    "ChatDataSection",
    "DataSection",
    "DistillRecipe",
    "EnvironmentSection",
    "FilterSection",
    "FineTuningRecipe",
    "GRPOSection",
    "LoRASection",
    "MTPSection",
    "MixSection",
    "ModelSection",
    "OPDSection",
    "OptimizerSection",
    "PairDataSection",
    "PairsSection",
    "ParallelSection",
    "PolicyMTPSection",
    "PretrainRecipe",
    "RLRecipe",
    "Recipe",
    "RewardModelSection",
    "RewardRecipe",
    "RewardSection",
    "RolloutsSection",
    "SFTRecipe",
    "ScheduleSection",
    "Source",
    "SpikesSection",
    "TokenizerSection",
    "TrainSection",
    "load_recipe",
    "parse_recipe",
]


RecipeT = TypeVar("RecipeT", bound=Recipe)


@overload
def load_recipe(path: str | Path, recipe: type[RecipeT], overrides: list[str] | None = None) -> RecipeT: ...
@overload
def load_recipe(path: str | Path, recipe: str, overrides: list[str] | None = None) -> Recipe: ...
def load_recipe(path: str | Path, recipe: type[Recipe] | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe of one class, or of a kind ("pretrain"), apply overrides and validate it.

    Raises UserError with one sentence.
    """
    recipe = _class_of(recipe)
    path = Path(local_path(str(path)))
    try:
        raw = tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; see recipes/ for ready-made ones") from None
    except (ValueError, RecursionError) as e:  # also for too long numbers and too deep nesting
        raise UserError(f"recipe {path} is not valid TOML: {e}") from None
    texts = [_override(raw, word) for word in overrides or []]
    kind = recipe.model_fields["kind"].default
    found = raw.setdefault("kind", kind)
    if found != kind:
        raise UserError(f"recipe {path} is for 'rorqual {found}', not 'rorqual {kind}'")
    return _check(raw, recipe, str(path), dict(texts))


@overload
def parse_recipe(raw: dict[str, Any], recipe: type[RecipeT], source: str = "recipe") -> RecipeT: ...
@overload
def parse_recipe(raw: dict[str, Any], recipe: str, source: str = "recipe") -> Recipe: ...
def parse_recipe(raw: dict[str, Any], recipe: type[Recipe] | str, source: str = "recipe") -> Recipe:
    """Validate a recipe given as nested dictionaries, of a class or kind. Raises UserError with one sentence."""
    return _check(raw, _class_of(recipe), source, {})


def _class_of(recipe: type[Recipe] | str) -> type[Recipe]:
    if not isinstance(recipe, str):
        return recipe
    classes = (PretrainRecipe, SFTRecipe, RewardRecipe, RLRecipe, DistillRecipe)
    kinds = {known.model_fields["kind"].default: known for known in classes}
    if recipe not in kinds:
        raise UserError(f"there is no recipe for {recipe!r}; known are {', '.join(kinds)}")
    return kinds[recipe]


FieldPath = tuple[int | str, ...]  # of a field in a recipe, as pydantic gives it


def _check(raw: dict[str, Any], recipe: type[RecipeT], source: str, texts: dict[FieldPath, str]) -> RecipeT:
    """`texts`: the overrides' values as written, for text fields (`name=2`)."""
    try:
        return recipe.model_validate(current_fields(raw))
    except ValidationError as e:
        first = e.errors()[0]
        if first["type"] == "string_type" and first["loc"] in texts:
            _set(raw, first["loc"], texts.pop(first["loc"]))
            return _check(raw, recipe, source, texts)
        raise UserError(_one_sentence(first, source, recipe)) from None
    except UserError as e:
        raise UserError(f"{source}: {e}") from None


def _override(raw: dict[str, TomlValue], word: str) -> tuple[FieldPath, str]:
    """Set a field; returns its path and the value as written."""
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise UserError(f"override {word!r} is not of the form key=value, e.g. train.steps=100")
    if not whole(word):
        raise UserError(f"override {word!r} is not UTF-8 text; write it in UTF-8")
    try:
        parsed = tomllib.loads(f"v = {text}")
        value = parsed["v"] if len(parsed) == 1 else text
    except (ValueError, RecursionError):
        value = text
    path: FieldPath = ()
    here: TomlValue = raw
    for name in key.split("."):
        where = ".".join(map(str, path))
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                raise UserError(f"override {word!r}: {where} has entries 0 to {len(here) - 1}, not {name!r}")
            path, here = (*path, int(name)), here[int(name)]
        elif isinstance(here, dict):
            path, here = (*path, name), here.setdefault(name, {})
        else:
            raise UserError(f"override {word!r}: {where} is not a section")
    _set(raw, path, value)
    return path, text


def _set(raw: Any, path: FieldPath, value: TomlValue) -> None:
    for name in path[:-1]:
        raw = raw[name]
    raw[path[-1]] = value


def _one_sentence(error: Any, source: str, recipe: type[Recipe]) -> str:
    where = ".".join(str(x) for x in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(recipe, error["loc"][:-1])
        return f"{source}: field {where} is unknown; did you mean one of {', '.join(sorted(known))}?"
    if error["type"] == "missing":
        return f"{source}: field {where} is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = "" if isinstance(given, BaseModel | dict | list) else f" = {given!r:.80}"
    return f"{source}: {where}{shown}{': ' if where else ''}{message[0].lower() + message[1:]}"


def _fields_at(model: Any, loc: FieldPath) -> list[str]:
    """The fields of the section that `loc` leads to."""
    key = False  # whether the next part is a table's key
    for name in loc:
        if isinstance(name, int) or key:
            key = False
            continue
        annotation = model.model_fields[name].annotation
        key = get_origin(annotation) is dict
        model = annotation if isinstance(annotation, type) else annotation.__args__[-1 if key else 0]
    return list(model.model_fields)
