"""Fingerprints of a run's input files: a resumed run must have the same inputs.

RUN/inputs.json holds for each file its size, the BLAKE2b of its content, and its mtime, ctime and inode. A file with
the same stat values is not read again, so that hashing costs about 1 s per GB, once, at the start.
"""

import json
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from rorqual.data.corpus import SUFFIXES, find_files
from rorqual.errors import UserError, file_error
from rorqual.files import read_json, write_text
from rorqual.model.model_directory import model_directory
from rorqual.recipe import DistillRecipe, PretrainRecipe, Recipe, RewardRecipe, RLRecipe, SFTRecipe

NAME = "inputs.json"
MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model")

Inputs = dict[str, dict[str, Any]]


def keep_inputs(run_dir: Path, recipe: Recipe, begun: bool, moved_from: str | None = None) -> bool:
    """Write inputs.json. False where an earlier start that never trained had other inputs.

    moved_from: the recipe's `out` when inputs.json was last written. Raises UserError naming the first file that is
    missing, new or changed, when training has `begun`.
    """
    files = {str(path): path for path in files_of(recipe)}
    before, out = _read(run_dir / NAME), Path(moved_from or recipe.out)
    for name in [name for name in before if name not in files and Path(name).is_relative_to(out)]:
        before[str(Path(recipe.out, Path(name).relative_to(out)))] = before.pop(name)
    now = {name: _describe(path, before.get(name, {})) for name, path in files.items()}
    changed = [path for path in {**before, **now} if not _same(before.get(path), now.get(path))]
    if begun and before and changed:
        path = changed[0]
        how = "is missing" if path not in now else "is new" if path not in before else "has changed"
        raise UserError(
            f"{path} {how} since {run_dir} began; a resumed run must keep its data: restore the file, or start "
            "again under another name"
        )
    write_text(run_dir / NAME, json.dumps(now, indent=1), then="or set out to a writable place")
    return begun or not before or not changed


def files_of(recipe: Recipe) -> list[Path]:
    """The files that a recipe reads, sorted. Missing ones are skipped: reading them raises the error."""
    models, data = [recipe.model.path], []
    if isinstance(recipe, PretrainRecipe):
        models.append(recipe.tokenizer.path)
        data = [source.path for source in recipe.data.sources]
    elif isinstance(recipe, SFTRecipe):
        models += [] if recipe.tokenizer is None else [recipe.tokenizer.path]
        data = [recipe.data.path]
    elif isinstance(recipe, RewardRecipe):
        data = [path for path in (recipe.data.path, recipe.pairs and recipe.pairs.prompts) if path is not None]
        models += [recipe.pairs and recipe.pairs.model]
    elif isinstance(recipe, RLRecipe | DistillRecipe):
        data = [section.path for section in recipe.environments if section.path is not None]
        if isinstance(recipe, RLRecipe) and recipe.opd is not None:
            models += [recipe.opd.of(section.name) for section in recipe.environments]
        if isinstance(recipe, DistillRecipe):
            models = [recipe.teacher]  # the student's own run fingerprints the student
            data += [section.path for section in recipe.mix]
        if recipe.reward.model is not None:
            models.append(recipe.reward.model.path)
    found = {file for model in models if model is not None for file in files_of_model(Path(model))}
    return sorted(found | {file for path in data for file in _of_data(path)})


def files_of_model(path: Path) -> list[Path]:
    """The files of a model's directory, or a .gguf file, that its answers depend on."""
    if path.is_file():
        return [path]
    return [file for pattern in MODEL_FILES for file in model_directory(path).glob(pattern) if file.is_file()]


def _of_data(path: str) -> list[Path]:
    if Path(path).is_dir():  # a dataset
        return [file for file in Path(path).rglob("*") if file.is_file()]
    if Path(path).is_file():
        return [Path(path)]
    try:
        return find_files(path, (*SUFFIXES, ".json"))
    except UserError:
        return []


def _describe(path: Path, before: dict[str, Any]) -> dict[str, Any]:
    try:
        stat = path.stat()
        times = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if before.get("stat") == times and before.get("size") == stat.st_size:
            return before
    except OSError as e:
        raise file_error(path, e, "read") from e
    return {"size": stat.st_size, "blake2b": digest(path), "stat": times}


def digest(path: Path) -> str:
    """BLAKE2b of a file's content. Raises UserError."""
    try:
        with path.open("rb") as file:
            return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
    except OSError as e:
        raise file_error(path, e, "read") from e


def _same(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    return a is not None and b is not None and (a["size"], a["blake2b"]) == (b["size"], b["blake2b"])


def _read(path: Path) -> Inputs:
    then = "restore it, or delete it to accept the present data"
    try:
        found = read_json(path, then)
    except FileNotFoundError:
        return {}
    inputs: Inputs = {}
    for name, entry in found.items() if isinstance(found, dict) else [("", None)]:
        if isinstance(entry, dict) and "told" in entry:  # the key of earlier versions
            entry["stat"] = entry.pop("told")
        if not isinstance(entry, dict) or not {"size", "blake2b", "stat"} <= entry.keys():
            raise UserError(f"{path} is damaged (an entry lacks size, blake2b or stat); {then}")
        inputs[name] = entry
    return inputs
