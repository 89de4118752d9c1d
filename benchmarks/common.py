"""What every benchmark shares: the object a program reads, the table a person reads, and taking turns with a peer."""

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from machines import machine_class
from rorqual import strict_json
from rorqual.errors import Stopped, UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.plan.hardware import describe_machine
from rorqual.process_tuning import tune

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, turn: float = 300, whole: float = 1800, **more: str) -> argparse.Namespace:
    """turn, whole: seconds that a contestant may take. more: options of one's own, with their defaults."""
    tune()  # its second setting only, since torch is loaded; a contestant in a process of its own has its own
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, keeps no result")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="keep the object here; default: benchmarks/results/NAME-CLASS.json, of this class of processor",
    )  # fmt: skip
    for name, default, what in (("turn-limit", turn, "a turn"), ("limit", whole, "all its turns")):
        parser.add_argument(
            f"--{name}", type=float, metavar="SECONDS", help=f"a contestant's, for {what}; default: {default:g}"
        )
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}")
    args = parser.parse_args()
    quick = args.quick
    args.turn_limit = args.turn_limit or (min(turn, 120) if quick else turn)
    args.limit = args.limit or (min(whole, 300) if quick else whole)
    device = getattr(args, "device", "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no GPU here; say --device cpu --quick to see that it runs")
    if args.out is None and not quick:
        args.out = RESULTS / f"{Path(sys.argv[0]).stem}-{machine_class(device)}.json"
    if args.out is not None:
        _check_free(args.out, describe(device))
    return args


def program(main: Callable[[], None]) -> None:
    """A benchmark as a program: a mistake of the user's, or a signal to a run in it, ends it with one sentence."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what it has started would stay
    try:
        main()
    except (UserError, Stopped) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(e.exit_code if isinstance(e, Stopped) else 1)


# -- results and dtypes


def dtypes() -> list[str]:
    """What to try: BF16 only where the processor has units for it, since emulated it takes up to 70 times as long."""
    return ["float32"] if fastest_dtype() is torch.float32 else ["float32", "bfloat16"]


def fastest() -> str:
    return str(fastest_dtype()).removeprefix("torch.")


def short(dtype: str) -> str:
    """As names of contestants have it."""
    return {"float32": "fp32", "bfloat16": "bf16"}[dtype]


def describe(device: str) -> dict[str, Any]:
    found = describe_machine() | {"class": machine_class(device)}
    return found | {"fastest_dtype": fastest()} if device == "cpu" else found


def _check_free(path: Path, machine: dict[str, Any]) -> None:
    """Raises UserError where another machine's figures lie; those of this class and as many cores make way."""
    if not path.exists():
        return
    theirs = json.loads(path.read_text()).get("machine", {})
    if (theirs.get("class"), theirs.get("cores")) != (machine["class"], machine["cores"]):
        raise UserError(
            f"--out {path}: holds figures of {theirs.get('class', 'a machine without a class')}, {theirs.get('cores')} "
            f"cores, and this is {machine['class']}, {machine['cores']} cores; name another file"
        )


# -- turns


def take_turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work returns, `rounds` times in turn, so that a busy moment of the machine meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            gc.collect()
            found[name].append(work())
    return found


def ratio_of_rounds(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios of values measured in the same round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def median(found: dict[str, list[float]], name: str) -> float | str:
    """Of a contestant's rounds; a dash where it has none."""
    return statistics.median(found[name]) if name in found else "–"


# -- what is said


def report(
    name: str,
    args: argparse.Namespace,
    ratios: dict[str, float],
    figures: dict[str, Any],
    tables: Sequence[tuple[str, list[str], list[list[Any]]]],
    packages: Sequence[str],
    failed: dict[str, str] | None = None,
    ours: set[str] | None = None,
) -> None:
    """Print the tables (title, columns, rows) or the JSON object, and keep the object in args.out, if there is one.

    failed: contestants that are out, each with a sentence. Ends the program with status 1 where one of `ours` is.
    """
    failed = failed or {}
    machine = describe(getattr(args, "device", "cpu"))
    found = {
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
        "figures": figures,
        "failed": failed,
        "machine": machine,
        "versions": {package: _version(package) for package in packages},
        "commit": _commit(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(strict_json.dumps(found, indent=1) + "\n")
        print(f"kept in {args.out}", file=sys.stderr)
    if args.json:
        print(strict_json.dumps(found))
    else:
        print(_said_of(machine))
        if failed:
            tables = [*tables, ("Out", ["contestant", "why"], [list(pair) for pair in failed.items()])]
        for table in tables:
            _print_table(*table)
        for key, value in ratios.items():
            print(f"{key}: {value:.2f}")
    if broken := sorted(failed.keys() & (ours or set())):
        sys.exit(f"{name}: ours did not come through: {', '.join(broken)}")


def _said_of(machine: dict[str, Any]) -> str:
    said = f"{machine['accelerator'] or machine['processor']} ({machine['class']}), {machine['cores']} cores"
    if machine.get("fastest_dtype") == "float32":
        said += "; BF16 is emulated here, so all sides compute in FP32"
    return said


def _print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    print(f"\n{title}")
    cells = [columns, *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(padded))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
