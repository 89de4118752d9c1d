"""A small student: does it gain more from distillation, or from reinforcement learning alone, at equal time?

The student's network (recipes/r1-smollm2/student.toml) first reads text that needs no teacher, English that comes with
Python (balance.py) and problems with their answers, and learns to answer in the form of the tags, without reasoning.
From this common start it goes on twice for every seed: by distillation, sampling and training, and by GRPO alone for as
long on the same clock, evaluations apart. Where sampling takes more than a fiftieth of the training, GRPO also runs for
as long as the training alone. pass@1 is on held-out problems of three families, with 95 % intervals over problems; the
difference of the two is paired by seed, with Student's t over the seeds.

--teacher: a model's directory, whose tokenizer the student then has; by default solutions that the program writes
(rl/worked). --start: seconds for the common start; where it answers nothing right, RL alone has no reward to learn
from, so give it longer. --folder keeps the runs; an interrupted benchmark goes on there with those that had not ended.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from balance import documents
from common import arguments, fastest, program, report
from fp8_loss import interval
from rorqual.data.tokenizer import load_tokenizer
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.evals.evaluate import evaluate
from rorqual.evals.results import TaskResult
from rorqual.recipe import (
    WORKED_SOLUTIONS,
    DistillRecipe,
    EnvironmentSection,
    PretrainRecipe,
    RLRecipe,
    SFTRecipe,
    load_recipe,
    parse_recipe,
)
from rorqual.rl.distillation import distill
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.prompts import Template, problem_text
from rorqual.rl.rl_run import rl
from rorqual.speedrun.level import MODEL
from rorqual.train.training_run import pretrain, sft

RECIPE = Path(__file__).parents[1] / "recipes/r1-smollm2/student.toml"
FAMILIES = (
    EnvironmentSection(
        name="chain_sum", config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    ),
    EnvironmentSection(name="simple_equations", config={"max_value": 30}),
    EnvironmentSection(name="leg_counting", config={"min_animals": 2, "max_animals": 3, "max_instances": 9}),
)  # fmt: skip
SEEDS = 3
SPECIAL = ["<think>", "</think>", "<answer>", "</answer>"]
LENGTH = 384  # tokens of a sequence in training
TIMES, AS_LONG, TEMPORARY = "600, or 60 with --quick", "as long", "a temporary one"
SAMPLED = 0.02  # of the training's time: less of it for sampling makes no difference
DISTILLED, TUNED, SHORTER = "distillation", "RL alone", "RL alone, as long as the training"
FAST = {"name": "muon", "lr": 2e-3, "muon_lr": 4e-3, "weight_decay": 0.01}
SLOWER = FAST | {"lr": 1e-3, "muon_lr": 2e-3}


class Comparison:
    """What all branches share: a folder, the teacher, sizes and times."""

    def __init__(self, folder: Path, teacher: str, seconds: float, quick: bool) -> None:
        self.folder, self.teacher, self.seconds, self.quick = folder, teacher, seconds, quick
        self.written = teacher == WORKED_SOLUTIONS
        self.template: Template = "plain" if self.written else "chat"
        self.max_tokens = 64 if quick else 256
        self.environments = [open_environment(section) for section in FAMILIES]
        self.sections = [section.model_dump(exclude_none=True) for section in FAMILIES]
        self.network = MODEL if quick else load_recipe(RECIPE, DistillRecipe).model.config

    def start(self, seconds: float) -> Path:
        """The common start: half of the time on text, half on answers in tags."""
        text, answers = self.folder / "text.jsonl", self.folder / "answers.jsonl"
        problems = [p for e in self.environments for p in e.problems("train", 200 if self.quick else 8000, 0)]
        read = [*documents(), *(f"{p.question}\n{p.answer}" for p in problems)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in read))
        tokenizer = {"vocab_size": 4096, "special_tokens": SPECIAL} if self.written else {"path": self.teacher}
        pretrain(parse_recipe(
            self._common("pretrain", 0, seconds / 2) | {
                "model": {"config": self.network, "dtype": fastest()}, "tokenizer": tokenizer, "optimizer": FAST,
                "data": {"sources": [{"path": str(text)}], "sequence_length": LENGTH},
            },
            PretrainRecipe,
        ))  # fmt: skip
        model = self.folder / "pretrain" / "model"
        known = load_tokenizer(model)
        with answers.open("w") as file:
            for problem in problems:
                prompt, said = problem_text(problem, self.template, known), f"</think><answer>{problem.answer}</answer>"
                completion = said if prompt.endswith("<think>") else f"<think>{said}"
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        recipe = self._going_on("start", 0, seconds / 2, model)
        sft(parse_recipe(recipe | {"data": {"path": str(answers), "sequence_length": LENGTH}}, SFTRecipe))
        return self.folder / "start" / "model"

    def distilled(self, start: Path, seed: int) -> dict[str, Any]:
        """Trained for as long as it takes; sampling, and all that is not training, is counted apart."""
        many = (40 if self.quick else 6000) if self.written else (12 if self.quick else 1200)
        recipe = self._going_on(f"distill-{seed}", seed, self.seconds, start) | {
            "teacher": self.teacher, "environments": self.sections, "template": self.template, "problems": many,
            "samples": 4, "keep_per_problem": 2, "max_tokens": self.max_tokens, "sequence_length": LENGTH,
        }  # fmt: skip
        began = time.perf_counter()
        folder = distill(parse_recipe(recipe, DistillRecipe))
        whole, trained = time.perf_counter() - began, _trained(folder / "student")
        samples = (folder / "samples.jsonl").read_text().count("\n")
        return {"training": trained, "sampling": whole - trained, "samples": samples, **self._found(folder / "student")}

    def tuned(self, start: Path, seed: int, seconds: float, name: str) -> dict[str, Any]:
        raw = {
            "name": f"{name}-{seed}", "out": str(self.folder), "seed": seed, "seconds": seconds,
            "model": {"path": str(start), "dtype": fastest()}, "environments": self.sections,
            "template": self.template, "reward": {"accuracy": 1.0, "format": 0.1},
            "grpo": {
                "group_size": 4 if self.quick else 16, "questions_per_step": 4 if self.quick else 16, "kl": 0.0,
                "average": "token", "drop_zero_std_groups": True, "clip_high": 0.28, "max_tokens": self.max_tokens,
            },
            "optimizer": {"name": "muon", "lr": 2e-4, "muon_lr": 5e-4, "weight_decay": 0.0},
            "warmup_steps": 3, "decay": 0.3, "save_every": 1000,
        }  # fmt: skip
        folder = rl(parse_recipe(raw, RLRecipe))
        return {"training": _trained(folder), **self._found(folder)}

    def evaluated(self, model: Path) -> dict[str, TaskResult]:
        found = evaluate(
            Engine(model), self.environments, 4, 8 if self.quick else 200, template=self.template,
            max_tokens=self.max_tokens, quiet=True,
        )  # fmt: skip
        return found.tasks

    def _common(self, name: str, seed: int, seconds: float) -> dict[str, Any]:
        train = {"seconds": seconds, "batch_size": 6, "save_every": 1000, "eval_every": 1000}
        return {"name": name, "out": str(self.folder), "seed": seed, "device": "cpu", "train": train}

    def _going_on(self, name: str, seed: int, seconds: float, start: Path) -> dict[str, Any]:
        more = {
            "model": {"path": str(start), "dtype": fastest()},
            "optimizer": SLOWER,
            "balance": {"bias_speed": 0.001},
        }
        return self._common(name, seed, seconds) | more

    def _found(self, folder: Path) -> dict[str, Any]:
        found = self.evaluated(folder / "model")
        return {"tasks": {name: _short(task) for name, task in found.items()}, "pass_at_1": _mean(found)}


def _trained(folder: Path) -> float:
    """Seconds of a run's training, as its ledger has them."""
    return float(json.loads((folder / "ledger.json").read_text())["total"]["seconds"])


def _mean(found: dict[str, TaskResult]) -> float:
    return statistics.mean(task.pass_at_1 for task in found.values())


def _short(task: TaskResult) -> dict[str, Any]:
    return {"pass_at_1": task.pass_at_1, "interval": list(task.interval), "problems": task.problems}


def kept(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, read where an earlier benchmark in the folder has ended with it."""
    path = folder / f"{name}.json"
    if not path.exists():
        shutil.rmtree(folder / name, ignore_errors=True)  # a run that had not ended
        found = make()
        path.write_text(json.dumps(found) + "\n")
        print(f"{name}: pass@1 {found['pass_at_1']:.3f}", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def compared(folder: Path, teacher: str, seconds: float, start_seconds: float, seeds: int, quick: bool) -> list[Any]:
    """[the start, the runs]."""
    this, asked = Comparison(folder, teacher, seconds, quick), folder / "settings.json"
    settings = {"teacher": teacher, "seconds": seconds, "start_seconds": start_seconds, "quick": quick}
    if asked.exists() and json.loads(asked.read_text()) != settings:
        raise UserError(f"--folder {folder}: holds runs of other settings ({asked.read_text()}); name another")
    asked.write_text(json.dumps(settings))

    def first() -> dict[str, Any]:
        for begun in ("pretrain", "start"):
            shutil.rmtree(folder / begun, ignore_errors=True)
        model = this.start(start_seconds)
        found = this.evaluated(model)
        return {"tasks": {name: _short(task) for name, task in found.items()}, "pass_at_1": _mean(found)}

    before, start = kept(folder, "first", first), folder / "start" / "model"
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        taught = kept(folder, f"distill-{seed}", lambda seed=seed: this.distilled(start, seed))
        runs.append({"branch": DISTILLED, "seed": seed, **taught})
        forms = {"rl": (TUNED, taught["training"] + taught["sampling"])}
        if taught["sampling"] > SAMPLED * taught["training"]:
            forms["shorter"] = SHORTER, taught["training"]
        for name, (branch, long) in forms.items():
            found = kept(
                folder, f"{name}-{seed}", lambda seed=seed, long=long, name=name: this.tuned(start, seed, long, name)
            )
            runs.append({"branch": branch, "seed": seed, **found})
    return [before, runs]


def number(given: str, option: str, default: str, value: float) -> float:
    """Of an option; `value` where it is as by `default`. Raises UserError."""
    try:
        return value if given == default else float(given)
    except ValueError:
        raise UserError(f"{option} {given}: must be a number of seconds") from None


def main() -> None:
    args = arguments(
        __doc__, threads="0 (all)", teacher=WORKED_SOLUTIONS, seconds=TIMES, start=AS_LONG, folder=TEMPORARY
    )
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    if args.teacher != WORKED_SOLUTIONS and not Path(args.teacher).is_dir():
        raise UserError(f"--teacher {args.teacher}: is no directory; give a model's")
    seconds = number(args.seconds, "--seconds", TIMES, 60.0 if args.quick else 600.0)
    start_seconds = number(args.start, "--start", AS_LONG, seconds)
    seeds = 1 if args.quick else SEEDS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if args.folder == TEMPORARY else args.folder)
        folder.mkdir(parents=True, exist_ok=True)
        before, runs = compared(folder, args.teacher, seconds, start_seconds, seeds, args.quick)
    branches = list(dict.fromkeys(run["branch"] for run in runs))
    by_branch = {branch: [run for run in runs if run["branch"] == branch] for branch in branches}
    families = list(before["tasks"])
    rows = [["start", "–", "–", *(_cell(before["tasks"][f]) for f in families), f"{before['pass_at_1']:.3f}"]]
    for run in runs:
        cells = [_cell(run["tasks"][family]) for family in families]
        times = [f"{run.get('sampling', 0):.0f}", f"{run['training']:.0f}"]
        rows.append([f"{run['branch']}, seed {run['seed']}", *times, *cells, f"{run['pass_at_1']:.3f}"])
    figures: dict[str, Any] = {"before": before, "runs": runs, "teacher": args.teacher, "differences": {}}
    ratios: dict[str, float] = {}
    differences: list[list[Any]] = []
    for branch in branches[1:]:
        of_seed = {run["seed"]: run["pass_at_1"] for run in by_branch[branch]}
        taught = [run["pass_at_1"] for run in by_branch[DISTILLED] if run["seed"] in of_seed]
        alone = list(of_seed.values())
        found = interval([a - b for a, b in zip(taught, alone, strict=True)])
        figures["differences"][branch] = found
        if any(alone):
            ratios[f"pass-at-1/{branch}"] = statistics.mean(taught) / statistics.mean(alone)
        ends = "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in found["interval"])) if found["interval"] else "–"
        gains = [100 * (statistics.mean(x) - before["pass_at_1"]) for x in (taught, alone)]
        differences.append([branch, *(f"{gain:+.1f}" for gain in gains), f"{100 * found['mean']:+.1f}", ends])
    report(
        "student", args, ratios, figures,
        [
            (f"pass@1 on held-out problems, {seconds:g} s of training, teacher: {args.teacher}",
             ["", "sampling, s", "training, s", *families, "mean"], rows),
            ("Points over the start, and of distillation over the other",
             ["against", "distillation", "the other", "difference", "95 %, over seeds"], differences),
        ],
        ["torch", "reasoning-gym"],
    )  # fmt: skip


def _cell(task: dict[str, Any]) -> str:
    low, high = task["interval"]
    return f"{task['pass_at_1']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    program(main)
