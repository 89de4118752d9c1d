"""Telemetry of a run: metrics.jsonl, a progress bar, and trackio where requested."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rorqual import strict_json
from rorqual.errors import file_error
from rorqual.extras import require
from rorqual.files import write_text

Metric = float | int | str | list[float] | None

_KEPT = "metrics.damaged.jsonl"
BAR = ("loss", "reward", "valid_bpb", "valid_accuracy", "lr", "tokens_per_second", "rollout_tokens_per_second")


def mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


class Log(Protocol):
    """Where a run's metrics go."""

    def log(self, step: int, **metrics: Metric) -> None: ...
    def note(self, sentence: str) -> None: ...
    def back_to(self, step: int) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Of the processes that leave it to the first."""

    def log(self, step: int, **metrics: Metric) -> None: ...
    def note(self, sentence: str) -> None: ...
    def back_to(self, step: int) -> None: ...
    def close(self) -> None: ...


class Telemetry:
    """Logs each step as a JSON line of run_dir/metrics.jsonl, to the progress bar and to trackio."""

    def __init__(
        self, run_dir: Path, total: float | None, unit: str, track: bool = False, resume_step: int = 0
    ) -> None:
        """`total` is the length of the run in `unit` ("steps" or "seconds").

        Lines past `resume_step`, written by a run that was killed after its last checkpoint, are dropped.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self.step, self.unit = resume_step, unit
        self.bar = _Bar(total, unit)
        try:
            damaged = _drop_after(self.path, resume_step)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as e:
            raise file_error(self.path, e, then="then continue with --resume") from e
        if damaged:
            self.note(f"{self.path}: {damaged} lines were not JSON; the original file is kept as {_KEPT}")
        self.tracker = _tracker(Path(run_dir).name, resume_step > 0) if track else None

    def log(self, step: int, **metrics: Metric) -> None:
        """Record the metrics of `step`; those that are None are left out."""
        self.step = step
        line = {"step": step} | {k: v for k, v in metrics.items() if v is not None}
        self._write(line)
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=step)
        values = [(name, line.get(name)) for name in BAR]
        shown = [f"{name.replace('_', ' ')} {v:.4g}" for name, v in values if isinstance(v, int | float)]
        seconds = metrics.get("seconds")
        done = seconds if self.unit == "seconds" and isinstance(seconds, int | float) else step
        self.bar.update(done, f"step {step}  " + "  ".join(shown))

    def note(self, sentence: str) -> None:
        """Print a sentence and record it in metrics.jsonl."""
        self._write({"step": self.step, "note": sentence})
        self.bar.note(sentence)

    def back_to(self, step: int) -> None:
        """Drop the metrics of later steps, which will come again; notes stay. What is noted now is of the next step."""
        self.step = step + 1
        try:
            self.file.close()
            _drop_after(self.path, step, notes=False)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as e:
            raise file_error(self.path, e, then="then continue with --resume") from e

    def close(self) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # each line was flushed, and that reported any failure
            self.file.close()
        if self.tracker is not None:
            self.tracker.finish()

    def _write(self, line: Mapping[str, Metric]) -> None:
        try:
            self.file.write(strict_json.dumps(line) + "\n")
            self.file.flush()
        except OSError as e:
            raise file_error(self.path, e, then="then continue with --resume") from e


class _Bar:
    """rich's progress bar on a terminal; elsewhere a plain line every 30 seconds, for log files."""

    def __init__(self, total: float | None, unit: str) -> None:
        self.total, self.unit, self.last = total, unit, time.monotonic()
        self.progress = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(), TextColumn("{task.description}"))  # fmt: skip  # noqa: E501
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.progress.start()
            self.task = self.progress.add_task("starting", total=total)

    def update(self, done: float, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, description=text)
        elif time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            whole = f" of {self.total:.0f}" if self.total else ""
            print(f"{done:.0f}{whole} {self.unit}  {text}", file=sys.stderr, flush=True)

    def note(self, sentence: str) -> None:
        if self.progress is not None:
            self.progress.console.print(sentence, markup=False)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _drop_after(path: Path, step: int, notes: bool = True) -> int:
    """Drop the lines after `step`, their notes too or not, and a last line cut short by a crash.

    Returns the number of other lines that are not JSON with a step; a copy of the file with them is kept.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            if found["step"] <= step or (not notes and "note" in found):
                kept.append(strict_json.dumps(found) + "\n")  # earlier versions wrote bare NaN
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += number < len(lines)
    if damaged:
        shutil.copyfile(path, _unused(path.with_name(_KEPT)))
    write_text(path, "".join(kept) if step or not notes else "", then="then continue with --resume")
    return damaged


def _unused(path: Path) -> Path:
    """The path, or the first of PATH-2, PATH-3, … that is free."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def _tracker(name: str, resume: bool) -> Any:
    require("track")  # track = true in the recipe
    import trackio

    trackio.init(project="rorqual", name=name, resume="allow" if resume else "never")
    return trackio
