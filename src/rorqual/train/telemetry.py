"""What a run says while it runs: metrics.jsonl, a progress bar, and trackio where asked."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rorqual.errors import UserError

Metric = float | int | str | list[float] | None
BAR = ("loss", "reward", "valid_bpb", "lr", "tokens_per_second", "rollout_tokens_per_second")


class Telemetry:
    """One line of JSON a step in run_dir/metrics.jsonl, the same to the progress bar and trackio."""

    def __init__(
        self, run_dir: Path, total: float | None, unit: str, track: bool = False, resume_step: int = 0
    ) -> None:
        """`total` is the length of the run in `unit` ("steps" or "seconds").

        Lines past `resume_step`, written by a run that was killed after its last checkpoint, are dropped.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        _drop_after(self.path, resume_step)
        self.file = self.path.open("a")
        self.step, self.unit = resume_step, unit
        self.bar = _Bar(total, unit)
        self.tracker = _tracker(Path(run_dir).name, resume_step > 0) if track else None

    def log(self, step: int, *, done: float | None = None, **metrics: Metric) -> None:
        """Record the metrics of `step`; `done` moves the bar when its unit is not steps."""
        self.step = step
        line = {"step": step} | {k: v for k, v in metrics.items() if v is not None}
        self._write(line)
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=step)
        shown = [f"{k.replace('_', ' ')} {line[k]:.4g}" for k in BAR if isinstance(line.get(k), int | float)]
        if done is None:
            done = float(metrics["seconds"]) if self.unit == "seconds" and "seconds" in metrics else step
        self.bar.update(done, f"step {step}  " + "  ".join(shown))

    def note(self, sentence: str) -> None:
        """Say something to the user, and keep it with the metrics."""
        self._write({"step": self.step, "note": sentence})
        self.bar.say(sentence)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.tracker is not None:
            self.tracker.finish()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); free space, then --resume") from e


class _Bar:
    """rich's progress bar on a terminal; elsewhere a plain line every 30 seconds, fit for a log."""

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

    def say(self, sentence: str) -> None:
        if self.progress is not None:
            self.progress.console.print(sentence, markup=False)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a last line cut short by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept) if step else "")
    os.replace(temporary, path)


def _tracker(name: str, resume: bool) -> Any:
    try:
        import trackio
    except ImportError:
        raise UserError("track = true needs trackio; run 'pip install trackio' or set track = false") from None
    trackio.init(project="rorqual", name=name, resume="allow" if resume else "never")
    return trackio
