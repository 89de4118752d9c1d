"""The speedrun's reinforcement learning with this engine and with the one before it had a cache in blocks.

Both sides take the steps of a speedrun's own recipe from its pre-trained model, in turn.
The learning rate is next to none, so that both go on sampling from the same network; since each draws its own answers,
which differ in length, seconds are also given a token.
"""

import io
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from common import arguments, fastest, program, ratio_of_rounds, report
from peers import CACHE, once, run
from rorqual.errors import UserError
from workers import Field

BEFORE = "3f39c28cc1cf^"  # "Engine: a cache in blocks"
ROOT = Path(__file__).parents[1]


def source_before() -> Path:
    """The package of then, compiled."""

    def make(folder: Path) -> None:
        packed = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder, filter="data")
        # By pip, which has setuptools as new as this source wants.
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "installed", folder)

    return once(CACHE / "engine-before-blocks", make) / "installed"


def main() -> None:
    args = arguments(__doc__, turn=300, whole=3600, run="runs/speedrun")
    recipe = Path(args.run) / "rl" / "recipe.toml"
    if not recipe.exists():
        raise UserError(f"--run {args.run}: no {recipe}; run `rorqual speedrun` first, or name the folder of a run")
    rounds, problems = (1, 4) if args.quick else (30, 200)
    steps: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    readings: dict[str, list[float]] = {side: [] for side in steps}
    with Field(args.turn_limit, args.limit) as field:
        try:
            sources = {"before": source_before(), "now": ROOT / "src"}
        except (OSError, subprocess.CalledProcessError) as e:
            sources = {"now": ROOT / "src"}
            field.out("before", f"its source could not be made: {e}")
        for side, source in sources.items():
            # No dtype of the recipe's: "auto" is newer than one side, and BF16 may be emulated here.
            way = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
            field.enter(side, "speedrun_rl:Side", recipe, fastest(), ours=True, environment={"PYTHONPATH": way})
            field.ask(side, "step")  # warm
        field.ours = {"now"}
        for i in range(rounds):
            for side in sorted(sources, reverse=bool(i % 2)):
                steps[side].append(field.ask(side, "step"))
                if i % 5 == 0:
                    readings[side].append(field.ask(side, "evaluate", problems))
        steps = {side: found for side, found in steps.items() if side in field}
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
    pairs = {}
    if len(each) == 2:
        pairs = {name: ratio_of_rounds(values, each["now"][name]) for name, values in each["before"].items()}
    rows: list[list[Any]] = [
        [
            name,
            *(statistics.median(found[name]) for found in each.values()),
            *([pairs[name]["median"]] if pairs else []),
        ]
        for name in next(iter(each.values()), {})
    ]
    report(
        "rollout",
        args,
        {f"speedrun-rl/{name}": pair["median"] for name, pair in pairs.items()},
        {"rounds": each, "ratio_of_rounds": pairs, "before": BEFORE},
        [("The speedrun's reinforcement learning", ["", *each, "ratio"], rows)],
        ["torch"],
        field.failed,
        field.ours,
    )


if __name__ == "__main__":
    program(main)
