"""The model card that a pipeline writes: stages, data, figures with intervals, cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rorqual.errors import UserError
from rorqual.evals.results import TaskResult, compare
from rorqual.files import read_json
from rorqual.recipe import DistillRecipe, Recipe, RewardRecipe, RLRecipe
from rorqual.rl.rejection_sampling import KEPT, Counts
from rorqual.train.reward_run import described, read_result

KINDS = {
    "pretrain": "pre-training",
    "sft": "fine-tuning",
    "rl": "reinforcement learning (GRPO)",
    "distill": "rejection sampling, then fine-tuning",
    "reward": "reward model",
}


class Stage(Protocol):
    name: str
    kind: str
    recipe: Recipe
    seconds: float
    tasks: dict[str, TaskResult]
    student: bool

    @property
    def model(self) -> Path: ...
    @property
    def counts(self) -> dict[str, Any]: ...
    @property
    def families(self) -> Counts: ...


StageT = TypeVar("StageT", bound=Stage)


def tuned(stages: Sequence[StageT]) -> StageT:
    """The last stage that is no student and no reward model: its model is the pipeline's."""
    return [stage for stage in stages if not stage.student and stage.kind != "reward"][-1]


def card(name: str, stages: Sequence[Stage], before: Mapping[str, TaskResult]) -> str:
    """In Markdown, with Hugging Face's front matter. before: results of the model that the pipeline began with."""
    start = stages[0].recipe.model.path or "random weights"
    rows = "\n".join(f"| {stage.name} | {KINDS[stage.kind]} | {_data(stage)} | {_cost(stage)} |" for stage in stages)
    total = sum(stage.seconds for stage in stages)
    beside = "".join(_student(stage) for stage in stages if stage.student)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rorqual, r1]
---
# {name}

Made from `{start}` by Rorqual (`rorqual r1`), seed {stages[0].recipe.seed}, in {total / 3600:.2f} hours without
evaluations.

| stage | what | data | cost |
|---|---|---|---|
{rows}
{beside}
{_figures(stages, before)}"""


def _student(stage: Stage) -> str:
    start = stage.recipe.model.path
    of = f"made from `{start}`" if start else "of random weights at its start"
    return f"\nThe model of stage {stage.name} is not this one but a student beside it, {of}: `{stage.model}`.\n"


def _data(stage: Stage) -> str:
    recipe = stage.recipe
    if isinstance(recipe, DistillRecipe):
        kept = sum(found[KEPT] for found in stage.families.values())
        sampled = sum(sum(found.values()) for found in stage.families.values())
        mixed = stage.counts.get("mixed in", 0)
        more = f", {mixed:,} conversations mixed in" if mixed else ""
        return f"{kept:,} of {sampled:,} completions of {recipe.teacher}{more}"
    if isinstance(recipe, RLRecipe):
        families = ", ".join(section.name for section in recipe.environments)
        return f"{families}; {recipe.grpo.questions_per_step} × {recipe.grpo.group_size} answers a step"
    if isinstance(recipe, RewardRecipe):
        return described(read_result(recipe.run_dir))
    return "its recipe's"


def _cost(stage: Stage) -> str:
    ledger = read_object(stage.model.parent / "ledger.json")
    if not ledger:
        return f"{stage.seconds:,.0f} s"
    total = ledger["total"]
    energy = f", {ledger['joules'] / 3.6e6:.2f} kWh" if ledger.get("joules") else ""
    tokens, flops = total["tokens"], total["flops"]
    return f"{stage.seconds:,.0f} s, {tokens:,.0f} tokens, {flops:.3g} FLOP{energy}"


def _figures(stages: Sequence[Stage], before: Mapping[str, TaskResult]) -> str:
    evaluated = [stage for stage in stages if stage.tasks]
    if not evaluated:
        return ""
    names = list(evaluated[-1].tasks)
    rows = [("start", before)] if before else []
    rows += [(stage.name, stage.tasks) for stage in evaluated]
    lines = [f"| {name} | " + " | ".join(_cell(tasks.get(task)) for task in names) + " |" for name, tasks in rows]
    last = tuned(stages)
    students = [stage for stage in evaluated if stage.student]
    pairs = [(found.name, found.tasks, "start", before) for found in (last, *students) if before]
    pairs += [(last.name, last.tasks, found.name, found.tasks) for found in _before_rl(stages) if found is not last]
    pairs += [(found.name, found.tasks, last.name, last.tasks) for found in students]
    for this, tasks, other, others in pairs:
        gains = compare(others, tasks)
        cells = [
            f"{100 * g.gain:+.1f} [{100 * g.interval[0]:+.1f}, {100 * g.interval[1]:+.1f}]" if g else "–"
            for g in map(gains.get, names)
        ]
        lines.append(f"| {this} over {other}, paired by problem | {' | '.join(cells)} |")
    settings = evaluated[-1].tasks[names[0]]
    return f"""## Accuracy

pass@1 in per cent on {settings.problems} held-out problems of each family, 95 % intervals over problems.

| after | {" | ".join(names)} |
|---|{"---|" * len(names)}
{chr(10).join(lines)}
"""


def _before_rl(stages: Sequence[StageT]) -> list[StageT]:
    """The stage whose model the first reinforcement learning began with, if it was evaluated."""
    starts = [stage.recipe.model.path for stage in stages if stage.kind == "rl"][:1]
    return [stage for stage in stages if stage.tasks and starts and stage.model == Path(starts[0] or "")]


def _cell(found: TaskResult | None) -> str:
    if found is None:
        return "–"
    low, high = found.interval
    return f"{100 * found.pass_at_1:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def read_object(path: Path) -> dict[str, Any]:
    """Of a JSON file that a stage wrote; {} where there is none. Raises UserError for a damaged one."""
    try:
        found = read_json(path, "delete it, then continue with --resume")
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no object); delete it, then continue with --resume")
    return found
