"""The speedrun's reinforcement learning with this engine and with the one before it had a cache in blocks.

Both sides take the steps of a speedrun's own recipe from its pre-trained model, in processes of their own and in turn.
The learning rate is next to none, so that both go on sampling from the same network; since each draws its own answers,
which differ in length, seconds are also given a token.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from common import arguments, program, ratio_of_rounds, report
from peers import CACHE, once
from rorqual.errors import UserError

BEFORE = "3f39c28cc1cf^"  # "Engine: a cache in blocks"
ROOT = Path(__file__).parents[1]


def source_before() -> Path:
    """The package's source of then, compiled."""

    def make(folder: Path) -> None:
        packed = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder, filter="data")
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True)

    return once(CACHE / "engine-before-blocks", make) / "src"


class Side:
    """A process with the trainer of one of the two sources; only one works at a time."""

    def __init__(self, source: Path, recipe: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(source)}
        command = [sys.executable, __file__, "--steps-of", str(recipe)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def work(recipe_file: str) -> None:
    """In a side's process: a step or an evaluation for each line that comes."""
    from rorqual.process import tune

    tune()
    from rl_step import timed
    from rorqual.reason.environment import open_environment
    from rorqual.reason.trainer import RLTrainer
    from rorqual.recipe import load_recipe
    from rorqual.train.prepare import build_model, tokenizer_of

    recipe = load_recipe(recipe_file, "rl")
    recipe.optimizer.lr = recipe.optimizer.muon_lr = 1e-9
    tokenizer = tokenizer_of(recipe.model)
    environments = [open_environment(section) for section in recipe.environments]
    trainer = RLTrainer(build_model(recipe.model, tokenizer, recipe.seed), tokenizer, environments, recipe)
    rollouts = timed(trainer.engine, "generate")
    for line in sys.stdin:
        tokens, start = trainer.tokens, time.perf_counter()
        rollouts.clear()
        if line.strip() == "step":
            trainer.step()
        else:
            trainer.evaluate(int(line))
        found = {"seconds": time.perf_counter() - start, "rollout": sum(rollouts), "tokens": trainer.tokens - tokens}
        print(json.dumps(found), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--steps-of"]:
        return work(sys.argv[2])
    args = arguments(__doc__.splitlines()[0], run="runs/speedrun")
    recipe = Path(args.run) / "rl" / "recipe.toml"
    if not recipe.exists():
        raise UserError(f"--run {args.run}: no {recipe}; run `rorqual speedrun` first, or name the folder of a run")
    rounds, problems = (1, 4) if args.quick else (30, 200)
    sides = {"before": Side(source_before(), recipe), "now": Side(ROOT / "src", recipe)}
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    readings: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():  # warm
        side.ask("step")
    for i in range(rounds):
        for name in sorted(sides, reverse=bool(i % 2)):
            steps[name].append(sides[name].ask("step"))
            if i % 5 == 0:
                readings[name].append(sides[name].ask(str(problems))["seconds"])
    for side in sides.values():
        side.close()
    each = {
        name: {
            "s a step": [s["seconds"] for s in found],
            "rollout, s": [s["rollout"] for s in found],
            "learning, s": [s["seconds"] - s["rollout"] for s in found],
            "rollout, ms a token": [1000 * s["rollout"] / s["tokens"] for s in found],
            f"{problems} problems a family read, s": readings[name],
        }
        for name, found in steps.items()
    }
    pairs = {name: ratio_of_rounds(values, each["now"][name]) for name, values in each["before"].items()}
    rows: list[list[Any]] = [
        [name, *(statistics.median(each[side][name]) for side in sides), pairs[name]["median"]] for name in pairs
    ]
    report(
        "rollout",
        args,
        {f"speedrun-rl/{name}": pair["median"] for name, pair in pairs.items()},
        {"rounds": each, "ratio_of_rounds": pairs, "before": BEFORE},
        [("The speedrun's reinforcement learning", ["", "before", "now", "ratio"], rows)],
        ["torch"],
    )


if __name__ == "__main__":
    program(main)
