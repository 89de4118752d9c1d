"""Pre-training of the speedrun's model on this machine: one process with all threads against processes of one thread.

The same recipe, batch and text; processes share a step's sequences (data parallelism, ZeRO-1) and talk through gloo.
Each run is a command of its own; they take turns. Tokens/s are those of metrics.jsonl, without the first steps.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import arguments, program, ratio_of_rounds, report, take_turns
from rorqual.recipe import PretrainRecipe, parse_recipe
from rorqual.speedrun.level import BATCH, LENGTH, MODEL, OPTIMIZER
from rorqual.train.run_folder import to_toml

ROOT = Path(__file__).parents[1]
WARM = 5  # steps
ALONE, TOGETHER = "one process", "processes"


def recipe(out: Path, steps: int) -> PretrainRecipe:
    raw = {
        "name": "run", "out": str(out), "seed": 1, "model": {"config": MODEL}, "tokenizer": {"vocab_size": 1000},
        "data": {"sources": [{"path": str(ROOT / "docs" / "*.md")}], "sequence_length": LENGTH},
        "optimizer": OPTIMIZER, "train": {"steps": steps, "batch_size": BATCH, "save_every": steps},
    }  # fmt: skip
    return parse_recipe(raw, PretrainRecipe, "processes")


def speed(processes: int, threads: int, steps: int, losses: dict[int, float]) -> float:
    """Tokens/s of a run; its last loss is put into `losses`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(to_toml(recipe(Path(folder), steps).model_dump()))
        command = [sys.executable, "-m", "rorqual", "pretrain", str(path), "--processes", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses[processes] = lines[-1]["loss"]
    return statistics.median(line["tokens_per_second"] for line in lines[WARM:])


def main() -> None:
    args = arguments(__doc__)
    cores = os.cpu_count() or 1
    steps, rounds = (8, 1) if args.quick else (40, 9)
    losses: dict[int, float] = {}
    works: dict[str, Callable[[], float]] = {
        ALONE: partial(speed, 1, cores, steps, losses),
        TOGETHER: partial(speed, cores, 1, steps, losses),
    }
    found = take_turns(works, rounds)
    ratio = ratio_of_rounds(found[TOGETHER], found[ALONE])
    figures: dict[str, Any] = {
        "tokens_per_second": {name: statistics.median(values) for name, values in found.items()},
        "rounds": found, "ratio": ratio, "last_loss": losses, "processes": cores,
    }  # fmt: skip
    rows = [
        [f"one process, {cores} threads", figures["tokens_per_second"][ALONE], losses[1]],
        [f"{cores} processes, 1 thread each", figures["tokens_per_second"][TOGETHER], losses[cores]],
    ]
    title = f"the speedrun's model, {BATCH} sequences of {LENGTH} tokens a step"
    columns = ["", "tokens/s", "loss at the end"]
    report("processes", args, {"processes/threads": ratio["median"]}, figures, [(title, columns, rows)], ["torch"])


if __name__ == "__main__":
    program(main)
