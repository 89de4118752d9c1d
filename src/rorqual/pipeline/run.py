"""Runs a pipeline's file: each stage as the verb of its kind does, with an evaluation after each, and a report."""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual import strict_json
from rorqual.checkpoint.model_writer import new_directory
from rorqual.console import output
from rorqual.errors import UserError
from rorqual.evals.result_tables import gains_table
from rorqual.evals.results import TaskResult, compare
from rorqual.files import locked, write_text
from rorqual.pipeline.card import card, read_object, tuned
from rorqual.pipeline.evaluation import START, Evaluations, read_section
from rorqual.plan.pipeline_file import COMMON, LINKS, MIX, pipeline_at, recipe_kind
from rorqual.recipe import DistillRecipe, Recipe, RLRecipe, load_recipe
from rorqual.report import write_report
from rorqual.rl.distillation import COUNTS, described, distill
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rejection_sampling import Counts
from rorqual.rl.reward_training import reward
from rorqual.rl.rl_run import rl
from rorqual.strict_json import is_finite
from rorqual.train.reward_run import described as accuracy
from rorqual.train.reward_run import read_result
from rorqual.train.run_folder import to_toml
from rorqual.train.training_run import pretrain, sft

RUNS: dict[str, Callable[..., Path]] = {
    "pretrain": pretrain, "sft": sft, "rl": rl, "distill": distill, "reward": reward,
}  # fmt: skip
STATE = "pipeline.json"
SAMPLING = ("distill", "reward")  # they sample before they train, which is all that their ledgers count


@dataclass
class StageRun:
    """One stage: its recipe, and what it took."""

    name: str
    kind: str
    recipe: Recipe
    text: str  # of the recipe, before a run has chosen what it leaves open; compared when a pipeline goes on
    seconds: float = 0.0  # over all resumptions, of SAMPLING kinds since the last; evaluations are apart
    tasks: dict[str, TaskResult] = field(default_factory=dict[str, TaskResult])
    student: bool = False  # whether its model is another than the one that the pipeline began with

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def model(self) -> Path:
        return self.folder / ("student/model" if self.kind == "distill" else "model")

    @property
    def counts(self) -> dict[str, Any]:
        """A distillation's COUNTS."""
        return read_object(self.folder / COUNTS)

    @property
    def families(self) -> Counts:
        """Of a distillation's completions: how many were kept, or left out and why."""
        return {family: Counter(found) for family, found in self.counts.items() if isinstance(found, dict)}


def run_pipeline(path: Path, out: Path | None = None, seed: int | None = None, resume: bool = False) -> Path:
    """Run the stages of the file at `path`; returns the folder with report.html, README.md and model/.

    out, seed: instead of the file's and the recipes', as `read_pipeline` says. With `resume` stages that have ended are
    kept, and the one that was stopped goes on from its last checkpoint. Every recipe and environment is checked before
    the first stage.
    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    file, out = pipeline_at(path, out, seed)
    stages: list[StageRun] = []
    for stage in file.stages:
        if stage.recipe is None:
            raise UserError(f"{stage.where}: it has no recipe, so it can be planned only; give it one")
        if unknown := sorted(stage.fields.keys() - set(COMMON)):
            known = f"recipe, name, {', '.join(LINKS)}, {MIX}; and for plans {', '.join(COMMON)}"
            raise UserError(f"{stage.where}: field {unknown[0]} is unknown; known are {known}")
        kind = recipe_kind(stage.recipe)
        recipe = load_recipe(stage.recipe, kind, stage.overrides)
        parallel = getattr(recipe, "parallel", None)
        if parallel is not None and parallel.processes > 1:
            raise UserError(f"{stage.where}: it is for {parallel.processes} processes; run it by itself, or take one")
        text = to_toml(recipe.model_dump(exclude={"out", "track", "device"}))
        stages.append(StageRun(stage.name, kind, recipe, text))
    _check(stages)
    _find_students(stages)
    section = read_section(path, file.evaluate)
    console = output()
    with locked(_made(out) / ".lock", f"{out}: another process runs a pipeline in it"):
        evaluations = None if section is None else Evaluations(out / "evaluations", section)
        done = _read_state(out, stages, resume)
        before: dict[str, TaskResult] = {}
        if evaluations is not None and evaluations.section.start is not None:
            console.print(f"[bold]{START}[/bold]: evaluation")
            before = evaluations.of(START, Path(evaluations.section.start))
        for number, stage in enumerate(stages, 1):
            console.print(f"[bold]{number}/{len(stages)} {stage.name}[/bold]")
            if stage.name in done:
                stage.seconds = done[stage.name]["seconds"]
            else:
                began = time.monotonic()
                RUNS[stage.kind](stage.recipe, resume=True)
                stage.seconds = _ledger_seconds(stage) or time.monotonic() - began
                done[stage.name] = {"recipe": stage.text, "seconds": stage.seconds}
                write_text(out / STATE, strict_json.dumps(done, indent=1) + "\n", then="then continue with --resume")
            if evaluations is not None and stage.kind != "reward":  # which is no language model
                stage.tasks = evaluations.of(stage.name, stage.model)
                for other, tasks in {START: before, **_started_from(stage, stages)}.items():
                    if tasks:
                        console.print(gains_table(compare(tasks, stage.tasks), f"{stage.name} over {other}"))
        _finish(out, file.name, stages, before)
    return out


def _check(stages: list[StageRun]) -> None:
    """Raises UserError for an environment or a kind that a later stage could not start with."""
    if all(stage.kind == "reward" for stage in stages):
        raise UserError("all stages train reward models, so there is no model to release; run them by rorqual reward")
    for stage in stages:
        if stage.kind not in RUNS:
            raise UserError(f"stage {stage.name}: kind = {stage.kind!r} is not one of {', '.join(RUNS)}")
        if isinstance(stage.recipe, RLRecipe | DistillRecipe):
            for section in stage.recipe.environments:
                open_environment(section)


def _find_students(stages: list[StageRun]) -> None:
    """Marks the stages that go on neither with the pipeline's first model nor with what a stage has made of it."""
    starts = [None if stage.recipe.model.path is None else Path(stage.recipe.model.path) for stage in stages]
    line = {starts[0], stages[0].model}
    for stage, start in zip(stages[1:], starts[1:], strict=True):
        stage.student = stage.kind != "reward" and (start is None or start not in line)
        if not stage.student:
            line.add(stage.model)


def _started_from(stage: StageRun, stages: list[StageRun]) -> dict[str, dict[str, TaskResult]]:
    """The results of the stage whose model this one goes on with, by its name."""
    start = stage.recipe.model.path
    return {other.name: other.tasks for other in stages if start is not None and other.model == Path(start)}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_state(out: Path, stages: list[StageRun], resume: bool) -> dict[str, Any]:
    """The stages that have ended. Raises UserError for a begun pipeline without `resume`, or with other recipes."""
    begun = [stage for stage in stages if stage.folder.exists()]
    if begun and not resume:
        raise UserError(f"{out} already holds stage {begun[0].name}; continue with --resume or choose another --out")
    done = read_object(out / STATE)
    for name, entry in done.items():
        known = entry if isinstance(entry, dict) else {}
        if not isinstance(known.get("recipe"), str) or not is_finite(known.get("seconds")):
            raise UserError(
                f"{out / STATE} is damaged (stage {name} lacks its recipe or seconds); delete it, then continue "
                "with --resume"
            )
    for stage in stages:
        if stage.name in done and done[stage.name]["recipe"] != stage.text:
            raise UserError(
                f"{out}: stage {stage.name} has ended with another recipe ({stage.folder}/recipe.toml); set it back, "
                "or choose another --out"
            )
    return done


def _ledger_seconds(stage: StageRun) -> float | None:
    """Over all resumptions; None where the run's ledger does not count all of them."""
    ledger = read_object(stage.model.parent / "ledger.json")
    return float(ledger["total"]["seconds"]) if ledger and stage.kind not in SAMPLING else None


def _finish(out: Path, name: str, stages: list[StageRun], before: dict[str, TaskResult]) -> None:
    """Write model/ with the card, summary.json and report.html."""
    first = [{"name": START, "tasks": {task: found.to_dict() for task, found in before.items()}}] if before else []
    shown = [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "student": stage.student,
            "tasks": {task: found.to_dict() for task, found in stage.tasks.items()},
        }
        for stage in stages
    ]
    gains = {
        stage.name: {t: vars(g) for t, g in compare(before, stage.tasks).items()} for stage in stages if stage.tasks
    }
    summary = {
        "stages": first + shown,
        "gains": gains,
        "notes": [*_notes(stages), *(["gains are over the start"] if before else [])],
        "seed": stages[0].recipe.seed,
        "total_seconds": sum(stage.seconds for stage in stages),
        "chat_command": f"rorqual chat {out}/model",
    }
    then = "then continue with --resume"
    write_text(out / "summary.json", strict_json.dumps(summary, indent=1) + "\n", then=then)
    text = card(name, stages, before)
    if (out / "model").exists():
        shutil.rmtree(out / "model")
    with new_directory(out / "model", "saved") as temporary:
        for item in tuned(stages).model.iterdir():
            if item.is_file() and item.name != "README.md":
                shutil.copy2(item, temporary / item.name)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    write_text(out / "README.md", text, then=then)
    write_report(out)


def _notes(stages: list[StageRun]) -> list[str]:
    """What distillations kept, and why they left out the rest; how accurate reward models are; which are students."""
    kept = [f"{stage.name}, {line}" for stage in stages for line in described(stage.families)]
    kept += [f"{stage.name}: {accuracy(read_result(stage.folder))}" for stage in stages if stage.kind == "reward"]
    return kept + [f"{stage.name} is a student: its model is {stage.model}" for stage in stages if stage.student]
