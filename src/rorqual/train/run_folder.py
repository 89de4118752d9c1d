"""The folder of a run: out/name with recipe.toml, metrics.jsonl, checkpoints/, model/ and ledger.json."""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

from rorqual.errors import UserError, file_error
from rorqual.files import check_link, locked, write_text
from rorqual.kernels.dtype_names import COMPUTE
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.parallel.mesh import Mesh
from rorqual.recipe import DistillRecipe, Recipe
from rorqual.renamed import current_fields
from rorqual.sections import Section
from rorqual.train.input_fingerprints import keep_inputs

# Fields that a resumed run may change, since they do not affect the final weights, or by rounding alone (device).
FREE = {"out", "track", "device", "train.eval_every", "train.save_every", "train.keep", "save_every", "eval_every",
        "keep", "sample_every", "eval_problems", "data.workers", "rollouts.gpus"}  # fmt: skip
# What to do about spikes is decided when there is one; any layout goes on from what another wrote.
FREE_SECTIONS = ("spikes.", "parallel.")
ROUNDING = "parallel.dispatch"  # but this: it may round what travels
# Results of training: with one of these, the folder holds a run that can be resumed.
WORK = ("checkpoints", "samples.jsonl", "samples.partial.jsonl", "pairs.jsonl", "student", "model", "ledger.json")
# Fields that only the student of a distillation reads. They may change until the student's own run, in student/, has
# begun and checks them itself, so that a student that cannot start does not cost the samples.
STUDENT_FIELDS = ("model.", "tokenizer.", "optimizer.", "schedule.", "balance.", "train.", "sequence_length")

DTYPES = ("auto", *COMPUTE)
PREPARING = "preparing data"


@contextmanager
def open_run(recipe: Recipe, resume: bool, device: torch.device | str = "cpu") -> Iterator[Path]:
    """Create and lock the run's folder and save the resolved recipe; with `resume`, check that the recipe is the same.

    A `recipe.model.dtype` of "auto" becomes the dtype the run began with, else the fastest on `device`, which is saved
    too. A start that failed before it trained does not count as a run: the next one replaces it, whatever its recipe.

    Raises UserError when the folder holds a run and `resume` is false, when the recipe or its data have changed, when
    another process trains in the folder, when it holds other files, or when the checkpoints are missing.
    """
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    except OSError as e:
        raise file_error(run_dir, e, then="or set out to a writable place") from e
    if inside and not inside & {"recipe.toml", *WORK}:
        raise UserError(f"{run_dir} holds files that are not a run's ({min(inside)}); choose another name")
    with locked(run_dir / ".lock", f"{run_dir}: another process trains in it"):
        saved, begun, moved_from = run_dir / "recipe.toml", has_work(run_dir), recipe.out
        same_text = True  # as the text that an earlier start, which never trained, trained its tokenizer on
        if begun:
            if not resume:
                raise UserError(f"{run_dir} already holds {_held(recipe)} or choose another name")
            before = _read(saved)
            if recipe.model.dtype == "auto":
                recipe.model.dtype = before.get("model.dtype", "auto")
            _check_same(recipe, before, saved)
            _check_checkpoints(run_dir)
            moved_from = before.get("out", recipe.out)
        elif saved.exists():
            same_text = _tokenizer_fields(_read(saved)) == _tokenizer_fields(_resolved(recipe))
        if recipe.model.dtype == "auto":
            recipe.model.dtype = "bfloat16" if fastest_dtype(device) is torch.bfloat16 else "float32"
        recipe.device = "cuda" if torch.device(device).type == "cuda" else "cpu"
        write_text(saved, to_toml(recipe.model_dump()), then="or set out to a writable place")
        if not (keep_inputs(run_dir, recipe, begun, moved_from) and same_text):
            shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)
        yield run_dir


@contextmanager
def join_run(recipe: Recipe, resume: bool, mesh: Mesh, device: torch.device | str = "cpu") -> Iterator[Path]:
    """`open_run` by the first process of the mesh; the others come in behind it, and take the dtype it has found."""
    # torchrun does not tell the processes of every machine that they are started anew.
    resume = any(map(bool, mesh.world.gather(torch.tensor([resume]), "opening the run")))
    if mesh.rank == 0:
        with open_run(recipe, resume, device) as run_dir:
            mesh.world.barrier("opening the run")
            yield run_dir
        return
    mesh.world.barrier("opening the run")
    recipe.model.dtype = _read(recipe.run_dir / "recipe.toml")["model.dtype"]
    yield recipe.run_dir


@contextmanager
def first_alone(mesh: Mesh) -> Iterator[None]:
    """The first process runs the block, then the others do: they find what it has written.

    It may take longer than a collective: meanwhile a thread of the first process tells the others that it is at work.
    """
    if mesh.section.processes == 1:
        yield
    elif mesh.rank:
        while not bool(mesh.world.gather(torch.zeros(1), PREPARING)[0]):
            pass
        yield
    else:
        ended: Queue[bool] = Queue()
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(_tell_others, mesh, ended)
            fine = False
            try:
                yield
                fine = True
            finally:
                ended.put(fine)
        told.result()


def _tell_others(mesh: Mesh, ended: "Queue[bool]") -> None:
    """Ranks in `first_alone` that the first is at work, until it says whether that came through."""
    while True:
        try:
            if ended.get(timeout=mesh.section.timeout / 4):
                mesh.world.gather(torch.ones(1), PREPARING)
            return  # after a failure the others see this process end
        except Empty:
            mesh.world.gather(torch.zeros(1), PREPARING)


def _held(recipe: Recipe) -> str:
    """What the run's folder holds, and how to go on."""
    run_dir = recipe.run_dir
    if isinstance(recipe, DistillRecipe) and (run_dir / "samples.jsonl").exists() and not has_work(run_dir / "student"):
        return (
            "the samples of a distillation whose student has not begun; continue with --resume, where the settings of "
            "the student (such as sequence_length=N) may change, remove the folder to sample again,"
        )
    return "a run; continue it with --resume"


def has_work(run_dir: Path) -> bool:
    """Whether there is training to resume. Raises UserError for a dangling link: its disk may be absent."""
    try:
        for path in (run_dir / name for name in WORK):
            check_link(path)
        return any(path.stat().st_size if path.is_file() else any(path.iterdir()) for path in
                   (run_dir / name for name in WORK) if path.exists())  # fmt: skip
    except OSError as e:
        raise file_error(e.filename or run_dir, e, "read") from e


def _check_checkpoints(run_dir: Path) -> None:
    """Raises UserError for a finished run without checkpoints: resuming would retrain it and overwrite its model."""
    ended = next((name for name in ("model", "ledger.json") if (run_dir / name).exists()), None)
    checkpoints = run_dir / "checkpoints"
    if ended and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        raise UserError(
            f"{run_dir} has ended ({ended} exists) and has no checkpoints to continue from; restore checkpoints/, "
            "or start again under another name"
        )


def to_toml(values: dict[str, Any], prefix: str = "") -> str:
    """Nested dictionaries as TOML; None, which TOML lacks, is left out."""
    lines, tables = [], []
    for key, value in values.items():
        name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)
        if isinstance(value, dict):
            tables.append(f"\n[{prefix}{name}]\n{to_toml(value, f'{prefix}{name}.')}")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            tables += [f"\n[[{prefix}{name}]]\n{to_toml(v, f'{prefix}{name}.')}" for v in value]
        elif value is not None:
            lines.append(f"{name} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # escaped in TOML, not in JSON


def _read(saved: Path) -> dict[str, Any]:
    """Its fields; those that a resumed run takes from there are of their type."""
    try:
        fields = _flat(current_fields(tomllib.loads(saved.read_text(encoding="utf-8")), quiet=True))
    except OSError as e:
        raise file_error(saved, e, "read", "or start a run with another name") from e
    except ValueError as e:  # not TOML, or not UTF-8
        raise UserError(f"{saved} is damaged ({e}); restore it, or start a run with another name") from e
    known = {"out": isinstance(fields.get("out", ""), str), "model.dtype": fields.get("model.dtype", "auto") in DTYPES}
    for name, right in known.items():
        if not right:
            raise UserError(
                f"{saved} is damaged ({name} = {_value(fields[name])}); restore it, or start a run with another name"
            )
    return fields


def _resolved(recipe: Recipe) -> dict[str, Any]:
    return _flat(tomllib.loads(to_toml(recipe.model_dump())))


def _tokenizer_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that determine the tokenizer a run trains."""
    return {name: value for name, value in fields.items() if name.startswith(("tokenizer.", "data.sources."))}


def _defaults(section: Section) -> dict[str, Any]:
    """Nested dictionaries of what its fields, and those of its sections, are where they are not given."""
    out: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            out[name] = _defaults(value)
        elif isinstance(value, list) and value and all(isinstance(v, Section) for v in value):
            out[name] = [_defaults(v) for v in value]
        elif not field.is_required():
            out[name] = field.get_default(call_default_factory=True)
    return out


def _check_same(recipe: Recipe, before: dict[str, Any], saved: Path) -> None:
    """A field that the saved recipe lacks, since another version wrote it, had what is its default now."""
    now = _resolved(recipe)
    before = _flat(tomllib.loads(to_toml(_defaults(recipe)))) | before
    free = (*FREE_SECTIONS, *STUDENT_FIELDS) if isinstance(recipe, DistillRecipe) else FREE_SECTIONS
    # Where a run goes back to its checkpoints, the weights depend on when they were saved.
    names = FREE - {"train.save_every"} if now.get("spikes.action") == "roll-back" else FREE
    for field in [*now, *before]:
        if field in names or (field.startswith(free) and field != ROUNDING):
            continue
        if before.get(field) != now.get(field) and _from_out(before, field) != _from_out(now, field):
            was, is_now = _shown(before, field), _shown(now, field)
            raise UserError(
                f"{saved}: {field} was {was} and is {is_now} now; a resumed run must keep its recipe, "
                "so set it back or choose another name"
            )


def _from_out(flat: dict[str, Any], field: str) -> Any:
    """A field's value; a path within `out` is made relative to it, since a folder of runs may move."""
    value, out = flat.get(field), flat.get("out")
    if isinstance(value, str) and isinstance(out, str) and Path(value).is_relative_to(out):
        return Path(value).relative_to(out)
    return value


def _shown(flat: dict[str, Any], field: str) -> str:
    return _value(flat[field]) if field in flat else "not set"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list) and any(isinstance(v, dict) for v in values):
        values = {str(i): v for i, v in enumerate(values)}
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.")
    return out
