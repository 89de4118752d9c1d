"""Each kernel at each level that this machine runs: GB/s, GFLOP/s, and the share of what the machine could do.

A level runs in a process of its own, limited by RORQUAL_CPU; `none` is without the compiled kernels, and PyTorch keeps
all its instructions at every level. The roofs are measured here, with all threads and instructions: GB/s of summing
1 GiB, and GFLOP/s of PyTorch's FP32 product of 2048 × 2048 matrices. A kernel's share of the roof is the time that its
bytes or its operations need there, whichever is longer, by the time it takes. Integer products count as operations too,
and can have more than FP32's roof; what lies in the caches can be read faster than memory. Rounds go through all levels
in turn. The parts of a fused decode step that are not here alone are timed by decode.py. --levels chooses.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import kernel_works
from common import arguments, program, report
from kernel_works import seconds_of
from machines import instruction_class
from rorqual.errors import UserError
from rorqual.processor import CLASSES, VARIABLE


def levels() -> list[str]:
    """Those of processor.py that this machine runs as themselves, best first, then PyTorch without kernels."""
    return list(CLASSES[CLASSES.index(instruction_class()) :: -1])


def roofs(quick: bool) -> dict[str, float]:
    numbers = torch.ones(1 << (20 if quick else 28))
    size = 128 if quick else 2048
    a, b = torch.randn(2, size, size)
    return {
        "bytes": numbers.nbytes / seconds_of(numbers.sum, quick),
        "operations": 2 * size**3 / seconds_of(lambda: a @ b, quick),
    }


def measured(level: str, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        # PyTorch keeps all its instructions at every level, of which it warns.
        quiet = ["-W", "ignore::UserWarning"]
        command = [sys.executable, *quiet, kernel_works.__file__, str(path), *(["--quick"] if quick else [])]
        done = subprocess.run(command, env=os.environ | {VARIABLE: level}, stdout=sys.stderr)
        if done.returncode:
            raise UserError(f"level {level} ended with {done.returncode}; its messages are above")
        return json.loads(path.read_text())


def main() -> None:
    args = arguments(__doc__, levels="all", rounds="3")
    known = levels()
    chosen = known if args.levels == "all" else args.levels.split()
    if unknown := [level for level in chosen if level not in known]:
        raise UserError(f"--levels {unknown[0]}: not here; there are {', '.join(known)}")
    rounds = 1 if args.quick else int(args.rounds)
    roof = roofs(args.quick)
    runs: dict[str, list[dict[str, Any]]] = {level: [] for level in chosen}
    for turn in range(rounds):
        for level in chosen:
            print(f"round {turn + 1} of {rounds}: {level}", file=sys.stderr, flush=True)
            runs[level].append(measured(level, args.quick))
    kernels = {level: {name: entry(name, found, roof) for name in found[0]} for level, found in runs.items()}
    ratios = {
        f"{name}/{level}": kernels[level][name]["seconds"] / own["seconds"]
        for level in chosen[1:]
        for name, own in kernels[chosen[0]].items()
    }
    tables = [
        (f"Level {level}", ["kernel", "ms", "GB/s", "GFLOP/s", "of the roof"], [row(*each) for each in found.items()])
        for level, found in kernels.items()
    ]
    said = [["memory", f"{roof['bytes'] / 1e9:.1f} GB/s"], ["FP32 products", f"{roof['operations'] / 1e9:.0f} GFLOP/s"]]
    figures = {"roofs": roof, "levels": kernels}
    report("kernels", args, ratios, figures, [("Roofs", ["", ""], said), *tables], ["torch"])


def entry(name: str, found: list[dict[str, Any]], roof: dict[str, float]) -> dict[str, float]:
    """A kernel's median over the rounds, and its share of the roof."""
    own = found[0][name]
    seconds = statistics.median(each[name]["seconds"] for each in found)
    least = max(own["bytes"] / roof["bytes"], own["operations"] / roof["operations"])
    return {**own, "seconds": seconds, "share": least / seconds}


def row(name: str, own: dict[str, float]) -> list[Any]:
    operations = own["operations"] / own["seconds"] / 1e9
    gigabytes = own["bytes"] / own["seconds"] / 1e9
    return [
        name, 1000 * own["seconds"], f"{gigabytes:.1f}", f"{operations:.0f}" if operations else "–",
        f"{own['share']:.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    program(main)
