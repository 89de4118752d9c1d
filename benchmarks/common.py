"""What every benchmark shares: the object a program reads, the table a person reads, and taking turns with a peer."""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.plan.machine import describe_machine
from rorqual.process import tune

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, **more: str) -> argparse.Namespace:
    """more: options of one's own, with their defaults."""
    tune()  # its second setting only, since torch is loaded; a peer in this process gets it too
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, keeps no result")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}")
    return parser.parse_args()


def program(main: Callable[[], None]) -> None:
    """A benchmark as a program: a mistake of the user's ends it with one sentence."""
    try:
        main()
    except UserError as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")


def take_turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work returns, `rounds` times in turn, so that a busy moment of the machine meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            gc.collect()
            found[name].append(work())
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio_of_rounds(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios of values measured in the same round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def report(
    name: str,
    args: argparse.Namespace,
    ratios: dict[str, float],
    figures: dict[str, Any],
    tables: Sequence[tuple[str, list[str], list[list[Any]]]],
    packages: Sequence[str],
) -> None:
    """Print the tables (title, columns, rows) or the JSON object, and keep the object in results/ unless --quick."""
    found = {
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
        "figures": figures,
        "machine": describe_machine(),
        "versions": {package: version(package) for package in packages},
        "commit": _commit(),
    }
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        print(json.dumps(found))
        return
    for title, columns, rows in tables:
        print(f"\n{title}")
        cells = [columns, *[[_cell(value) for value in row] for row in rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            print("  ".join(padded))
    for key, value in ratios.items():
        print(f"{key}: {value:.2f}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def _commit() -> str:
    """The commit measured, with a mark when the code differs from it."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
