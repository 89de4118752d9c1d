"""Resumable checkpoints: run_dir/checkpoints/step-N/{tensors.safetensors, state.json}.

A checkpoint exists whole or not at all: it is written beside its place, forced to disk and renamed.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import UserError

TENSORS, STATE = "tensors.safetensors", "state.json"


class Checkpoints:
    """Keeps the last `keep` checkpoints of a run and the best one."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.directory, self.keep = Path(run_dir) / "checkpoints", keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.directory.glob("step-*"))

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], score: float | None = None) -> None:
        """Write a checkpoint, then delete those no longer kept. `score`: lower is better.

        A step already saved stays as it is. Raises UserError when the disk is full; earlier checkpoints stay intact.
        """
        final, temporary = self.path(step), self.directory / f".writing-step-{step}"
        if final.exists():
            return
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps({"step": step, "score": score, "state": state}))
            for path in (temporary / TENSORS, temporary / STATE, temporary):
                _force_to_disk(path)
            os.replace(temporary, final)
            _force_to_disk(self.directory)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _as_user_error(e, final, self.steps()) from e
        self._prune()

    def load_latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that reads whole, as (step, tensors, state); removes what was left half-written."""
        for debris in self.directory.glob(".*-step-*"):
            shutil.rmtree(debris, ignore_errors=True)
        for step in reversed(self.steps()):
            try:
                tensors = load_file(self.path(step) / TENSORS)
                return step, tensors, json.loads((self.path(step) / STATE).read_text())["state"]
            except (OSError, SafetensorError, ValueError):
                self._remove(step)  # damaged after it was written, so of no use to anyone
        return None

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest score."""
        scores = {step: self._score(step) for step in self.steps()}
        scored = {step: score for step, score in scores.items() if score is not None}
        return min(scored, key=lambda step: scored[step]) if scored else None

    def _score(self, step: int) -> float | None:
        try:
            return json.loads((self.path(step) / STATE).read_text())["score"]
        except (OSError, ValueError):
            return None

    def _prune(self) -> None:
        steps, best = self.steps(), self.best()
        for step in steps[: -self.keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first, so that an interrupted deletion never looks like a checkpoint.
        going = self.directory / f".going-step-{step}"
        os.replace(self.path(step), going)
        shutil.rmtree(going, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_user_error(error: Exception, path: Path, steps: list[int]) -> UserError:
    intact = f"; step {steps[-1]} is intact" if steps else ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return UserError(f"{path}: the disk is full; free space and continue with --resume{intact}")
    return UserError(f"{path}: the checkpoint cannot be written ({error}){intact}")
