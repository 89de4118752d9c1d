"""What the models of a pipeline's stages can do: the same held-out problems for each.

evaluations/STAGE.json        the results, with the settings and the model's hashes that they are of
evaluations/STAGE-HASH/       the answers, as `rorqual eval --out` keeps them, of these settings and this model
"""

from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rorqual import strict_json
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.evals.evaluate import evaluate
from rorqual.evals.results import Scores, TaskResult
from rorqual.evals.tasks import Task, open_task, split_tasks
from rorqual.files import write_text
from rorqual.pipeline.card import read_object
from rorqual.sections import Count, LocalPath, Section, Share, Size, Temperature
from rorqual.train.input_fingerprints import digest, files_of_model

START = "start"  # the name of the model that the pipeline begins with


class EvaluateSection(Section):
    """`[evaluate]` of a pipeline's file: fields as the options of `rorqual eval`."""

    tasks: str
    start: LocalPath | None = None  # a model that is evaluated before the first stage
    problems: Count = 100
    samples: Size = 4
    template: Literal["chat", "r1-zero", "plain"] = "chat"
    temperature: Temperature = 0.6
    top_p: Share = 0.95
    max_tokens: Size = 512
    seed: int = Field(default=0, ge=0, lt=1 << 32)


def read_section(path: Path, raw: dict[str, Any] | None) -> EvaluateSection | None:
    """Raises UserError with one sentence."""
    if raw is None:
        return None
    try:
        return EvaluateSection.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: evaluate.{where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


class Evaluations:
    """The results of each model, in a folder with a file and the answers for each."""

    def __init__(self, folder: Path, section: EvaluateSection) -> None:
        """Raises UserError for an unknown task."""
        self.folder, self.section = folder, section
        self.tasks: list[Task] = [open_task(task) for task in split_tasks(section.tasks)]

    def of(self, name: str, model: Path) -> dict[str, TaskResult]:
        """By task; read where they were found before with the same settings and the same model."""
        path, settings = self.folder / f"{name}.json", self.section.model_dump()
        files = {file.name: digest(file) for file in sorted(files_of_model(model))}
        found = read_object(path)
        if found.get("settings") == settings and found.get("model") == files:
            return _results(path, found)
        given = self.section
        content = sha256(strict_json.dumps([settings, files]).encode()).hexdigest()[:8]
        result = evaluate(
            Engine(model), self.tasks, given.samples, given.problems, seed=given.seed, template=given.template,
            temperature=given.temperature, top_p=given.top_p, max_tokens=given.max_tokens,
            out=self.folder / f"{name}-{content}", model={"model": name},
        )  # fmt: skip
        kept = {"settings": settings, "model": files, **result.to_dict()}
        write_text(path, strict_json.dumps(kept, indent=1) + "\n", then="then continue with --resume")
        return _results(path, read_object(path))


def _results(path: Path, found: dict[str, Any]) -> dict[str, TaskResult]:
    """By task. Raises UserError for a damaged file."""
    try:
        return {task: _result(raw) for task, raw in found["tasks"].items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, then continue with --resume") from e


def _result(raw: dict[str, Any]) -> TaskResult:
    known = {f.name for f in fields(TaskResult)}
    values: dict[str, Any] = {name: value for name, value in raw.items() if name in known}
    values["by_difficulty"] = {level: Scores(**scores) for level, scores in raw["by_difficulty"].items()}
    return TaskResult(**values)
