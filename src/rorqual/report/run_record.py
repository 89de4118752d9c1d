"""Read and validate the files of a run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from rorqual.errors import UserError, file_error
from rorqual.renamed import current_metrics

ORDER = ("pretrain", "sft", "reward", "rl", "distill")  # of the sections for sub-runs
LARGEST = 1e100  # beyond it matplotlib finds no ticks
FILES = ("metrics.jsonl", "ledger.json")
STAGES = {
    "pretrain": "pre-training", "sft": "fine-tuning", "reward": "reward model", "rl": "reinforcement learning",
    "distill": "distillation",
}  # fmt: skip
TITLES = {
    "pretrain": "Pre-training",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "rl": "Reinforcement learning",
    "distill": "Rejection sampling and distillation",
    "cold-start": "Cold start",
}


@dataclass
class Part:
    """The metrics of one training run; `name`: its folder relative to the run's, "" for the run itself."""

    name: str
    lines: list[dict[str, Any]]
    notes: list[str]
    recipe: str = ""

    @property
    def title(self) -> str:
        first = self.name.partition("/")[0] or self.kind
        return TITLES.get(first, first.replace("-", " ").replace("_", " ").capitalize())

    @property
    def kind(self) -> str:
        """From the recipe where there is one, else from the metrics."""
        for kind in ORDER:
            if f'kind = "{kind}"' in self.recipe:
                return kind
        return "rl" if any("reward" in line for line in self.lines) else "pretrain"

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric."""
        pairs = [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def keys(self, prefix: str) -> list[str]:
        """The metrics whose name begins with `prefix`, in order of appearance."""
        return [k for k in dict.fromkeys(k for line in self.lines for k in line) if k.startswith(prefix)]


@dataclass
class Run:
    """The data of a report; missing files are empty."""

    path: Path
    parts: list[Part]
    summary: dict[str, Any] = field(default_factory=dict)
    ledgers: dict[str, dict[str, Any]] = field(default_factory=dict)  # by part name; "" is the whole run's
    recipe: str = ""

    @property
    def families(self) -> list[str]:
        """Task names in the order of the summary, the main one first."""
        found = dict.fromkeys(family for stage in self.stages for family in stage.get("tasks") or {})
        return [family for family in found if self.results(family)]

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [stage for stage in self.summary.get("stages") or [] if isinstance(stage, dict)]

    @property
    def difficulties(self) -> dict[str, dict[str, Any]]:
        """family → level → result, from the summary's table, else from the released model."""
        if table := self.summary.get("by_difficulty"):
            return table
        return {family: self.released(family)[-1].get("by_difficulty") or {} for family in self.families}

    def results(self, family: str) -> list[tuple[str, dict[str, Any]]]:
        """(stage, result) of the stages that were evaluated on `family`."""
        return [
            (stage_name(stage), stage["tasks"][family])
            for stage in self.stages
            if is_number(((stage.get("tasks") or {}).get(family) or {}).get("pass_at_1"))
        ]

    def released(self, family: str) -> list[dict[str, Any]]:
        """The results on the way to the run's own model: all but those of students, which stand beside it."""
        students = {stage_name(stage) for stage in self.stages if stage.get("student") is True}
        results = self.results(family)
        return [result for name, result in results if name not in students] or [result for _, result in results]


def stage_name(stage: dict[str, Any]) -> str:
    name = str(stage.get("name", ""))
    return STAGES.get(name, name)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


# Types that the report requires. A null field counts as absent; ANY: every other name.
ANY = "*"
OBJECT = {ANY: lambda value: True}
Shape = dict[str, Any] | list[Any] | Callable[[Any], bool]
RESULT = {"interval": _is_interval, "cons_interval": _is_interval, "by_difficulty": {ANY: {"interval": _is_interval}}}
SUMMARY: Shape = {
    "stages": [{"tasks": {ANY: RESULT}}],
    "by_difficulty": {ANY: {ANY: {"interval": _is_interval}}},
    "gains": {ANY: {ANY: {"interval": _is_interval}}},
    "thinking_curve": {ANY: [{"interval": _is_interval}]},
    "model": dict.fromkeys(("total", "active", "parameters_total", "parameters_active"), is_number),
    "samples": [OBJECT],
    "notes": [lambda note: True],
}
LEDGER: Shape = {"stages": {ANY: OBJECT}, "total": OBJECT, "predicted": OBJECT, "machine": OBJECT}


def read_run(path: Path) -> Run:
    """Read a run's folder. Raises UserError where it is missing, has nothing to report, or has invalid JSON."""
    if not path.is_dir():
        raise UserError(f"run folder {path} does not exist; give the folder of a run, e.g. runs/NAME")
    summary = _read_json(path / "summary.json", SUMMARY)
    stages = [str(stage.get("name")) for stage in summary.get("stages") or []]
    files = [file for depth in ("*", "*/*") for file in path.glob(f"{depth}/*") if file.name in FILES]
    folders = [
        path,
        *sorted({file.parent for file in files}, key=lambda folder: _order(folder.relative_to(path), stages)),
    ]
    parts, ledgers = [], {}
    for folder in folders:
        name = "" if folder == path else folder.relative_to(path).as_posix()
        part = _read_part(folder, name)
        if part.lines or part.notes:
            parts.append(part)
        if ledger := _read_json(folder / "ledger.json", LEDGER):
            ledgers[name] = ledger
    run = Run(path, parts, summary, ledgers, _read_text(path / "recipe.toml"))
    if not (run.parts or run.summary or run.ledgers):
        raise UserError(f"{path} holds no metrics.jsonl, summary.json or ledger.json; give the folder of a run")
    return run


def _order(folder: Path, stages: list[str]) -> tuple[int, str]:
    """As the stages of a pipeline are in its summary, else by kind."""
    first, known = folder.parts[0], stages or ORDER
    return (known.index(first) if first in known else len(known), folder.as_posix())


def _read_part(folder: Path, name: str) -> Part:
    """Metrics and notes of a folder, without lines that are not JSON objects with a step (a kill may cut the last)."""
    lines, notes = [], []
    for text in _read_text(folder / "metrics.jsonl").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and is_number(line.get("step")):
            if "note" in line:
                notes.append(f"step {line['step']}: {line['note']}")
            else:
                lines.append(current_metrics(line))
    return Part(name, lines, notes, _read_text(folder / "recipe.toml"))


def _read_json(path: Path, shape: Shape) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); delete it to report without it") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} must contain a JSON object, not a {type(value).__name__}; delete it to report without it"
        )
    return _validated(path, value, shape, "")


def _validated(path: Path, value: Any, shape: Shape, where: str) -> Any:
    """The value without its nulls. Raises UserError naming the field of a wrong type."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return {
            name: _validated(path, found, inner, f"{where}.{name}")
            if (inner := shape.get(name, shape.get(ANY)))
            else found
            for name, found in value.items()
            if found is not None
        }
    if isinstance(shape, list) and isinstance(value, list):
        found = [found for found in value if found is not None]
        return [_validated(path, inner, shape[0], f"{where}.{number}") for number, inner in enumerate(found)]
    if callable(shape) and shape(value):
        return value
    raise UserError(f"{path}: {where[1:]} = {value!r:.60} is not valid; delete the file to report without it")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise file_error(path, e, "read") from None
