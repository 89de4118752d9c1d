"""The files that a run reads, by content: a resumed run goes on with what it began with, or not at all.

RUN/inputs.json holds of each file its size, the BLAKE2b of its whole content, and what the system says of it
(modification, change, inode). A file of which the system says the same is not read again, so that this takes about a
second a GB once, at the start.
"""

import json
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from rorqual.data.corpus import SUFFIXES, find_files
from rorqual.errors import UserError, file_error
from rorqual.files import read_json, write_text
from rorqual.model.model_directory import model_directory
from rorqual.recipe import DistillRecipe, PretrainRecipe, Recipe, RLRecipe, SFTRecipe

NAME = "inputs.json"
OF_A_MODEL = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model")

Inputs = dict[str, dict[str, Any]]


def keep_inputs(run_dir: Path, recipe: Recipe, begun: bool, moved_from: str | None = None) -> bool:
    """Write down what the recipe's files are now. False where a start before, which never trained, had others.

    moved_from: the recipe's `out` when they were written down last. Raises UserError naming the first file that is
    another one now, when training has `begun`.
    """
    files = {str(path): path for path in files_of(recipe)}
    before, out = _read(run_dir / NAME), Path(moved_from or recipe.out)
    for name in [name for name in before if name not in files and Path(name).is_relative_to(out)]:
        before[str(Path(recipe.out, Path(name).relative_to(out)))] = before.pop(name)
    now = {name: _describe(path, before.get(name, {})) for name, path in files.items()}
    changed = [path for path in {**before, **now} if not _same(before.get(path), now.get(path))]
    if begun and before and changed:
        path = changed[0]
        how = "is gone" if path not in now else "is new" if path not in before else "has changed"
        raise UserError(
            f"{path} {how} since {run_dir} began; a resumed run must keep its data, so put it back as it was, or start "
            "again under another name"
        )
    write_text(run_dir / NAME, json.dumps(now, indent=1), then="or set out to a writable place")
    return begun or not before or not changed


def files_of(recipe: Recipe) -> list[Path]:
    """What a recipe reads from disk, sorted. What does not exist is left to those who read it."""
    models, data = [recipe.model.path], []
    if isinstance(recipe, PretrainRecipe):
        models.append(recipe.tokenizer.path)
        data = [source.path for source in recipe.data.sources]
    elif isinstance(recipe, SFTRecipe):
        data = [recipe.data.path]
    elif isinstance(recipe, RLRecipe | DistillRecipe):
        data = [section.path for section in recipe.environments if section.path is not None]
        if isinstance(recipe, DistillRecipe):
            models = [recipe.teacher]  # the student's run sees to the student
    found = {file for model in models if model is not None for file in _of_model(Path(model))}
    return sorted(found | {file for path in data for file in _of_data(path)})


def _of_model(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for pattern in OF_A_MODEL for file in model_directory(path).glob(pattern) if file.is_file()]


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
        told = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if before.get("told") == told and before.get("size") == stat.st_size:
            return before
        with path.open("rb") as file:
            digest = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
    except OSError as e:
        raise file_error(path, e, "read") from e
    return {"size": stat.st_size, "blake2b": digest, "told": told}


def _same(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    return a is not None and b is not None and (a["size"], a["blake2b"]) == (b["size"], b["blake2b"])


def _read(path: Path) -> Inputs:
    then = "restore it, or delete it to trust the data as it is"
    try:
        found = read_json(path, then)
    except FileNotFoundError:
        return {}
    entries = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(v, dict) and {"size", "blake2b", "told"} <= v.keys() for v in entries):
        raise UserError(f"{path} is not what was written; {then}")
    return found
