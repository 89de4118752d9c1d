"""Checkpoints of several processes: each writes what it owns to a file of its own, while training goes on.

Tensors are cut along dimension 0, so a checkpoint of any number of processes can be read by any other. (torch's
distributed checkpoints would do the same, but their index is a pickle, which this project does not load from files.)
All processes need the run's folder: across machines, on a file system that they share.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from rorqual import strict_json
from rorqual.errors import UserError, file_error
from rorqual.files import force_to_disk
from rorqual.parallel.data import Slice
from rorqual.parallel.mesh import Mesh
from rorqual.train.checkpoint_parts import Damaged, read_parts, take_descriptions, write_part
from rorqual.train.checkpoints import STATE, TENSORS, Checkpoints, is_score, to_stderr

CHECKPOINT = "checkpoint"
Found = TypeVar("Found")


class ShardedCheckpoints(Checkpoints):
    """`save` begins to write and `finish` ends it; what is called on one process is called on all."""

    def __init__(
        self, run_dir: Path, keep: int, mesh: Mesh, slices: Callable[[], Mapping[str, Slice]],
        notify: Callable[[str], None] = to_stderr,
    ) -> None:  # fmt: skip
        """slices: the rows that this process owns, of each tensor that is cut."""
        super().__init__(run_dir, keep, notify if mesh.rank == 0 else lambda _: None)
        self.world, self.slices = mesh.world, slices
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, dict[str, Any], Future[None]] | None = None

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], score: float | None = None,
        good: bool = True,
    ) -> None:  # fmt: skip
        """As for one process; `tensors` are those that this process is to write. Copies them, and returns."""
        self.finish()
        if self._first_says(self.path(step).exists()):
            return
        self._together(lambda: self._check_finite(step, tensors))
        folder = self._temporary(step)
        self._on_first(lambda: self._make(folder))
        copies = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        file = f"tensors-{self.world.place:05d}-of-{self.world.size:05d}.safetensors"
        described = {"step": step, "score": score if is_score(score) else None, "good": good, "state": state}
        self._pending = step, described, self._thread.submit(write_part, folder, file, copies, self.slices())

    def poll(self) -> None:
        """End a checkpoint that all processes have written."""
        if self._pending and all(self._say(self._pending[2].done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the newest checkpoint is whole. Raises UserError on all processes when one could not write."""
        if self._pending is None:
            return
        (step, described, written), self._pending = self._pending, None
        self._together(lambda: self._written(step, written))
        self._on_first(lambda: self._publish(step, described))

    def load_latest(self, good: bool = False) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """As for one process, with the rows that this one owns."""
        self._on_first(self._discard_leftovers)
        while (step := self._first_ones(good)) is not None:
            _, why = self._undamaged(lambda s=step: self._check_mine(s))
            if why is None:
                found, why = self._undamaged(lambda s=step: self._rows(s))
                if why is None and found is not None:
                    return step, *found
            self._on_first(lambda s=step, w=why: self._set_aside(s, Damaged(w or "a file")))
        self._together(self._check_not_all_damaged)
        return None

    def _undamaged(self, read: Callable[[], Found]) -> tuple[Found | None, str | None]:
        """Do it on all processes → what it returns, and what is damaged on this process or, as text, on another."""
        found, why = None, ""

        def attempt() -> None:
            nonlocal found, why
            try:
                found = read()
            except Damaged as e:
                why = str(e) or "damaged"
            except OSError as e:
                raise file_error(e.filename or self.directory, e, "read", "then continue with --resume") from e

        self._together(attempt)
        return found, (why or "a file") if any(self._say(bool(why))) else None

    def _rows(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Those that this process owns, and the state. Raises Damaged for wrong or missing content."""
        with self._damage():
            found = self._described(step)
            parts = found.get("parts") or _one_file(self.slices())
            return read_parts(self.path(step), parts, self.slices()), found["state"]

    def _first_ones(self, good: bool) -> int | None:
        """The newest step that the first process sees: a shared file system may show others an older list."""
        newest = next(iter(self._newest_first(good)), -1)
        step = int(self.world.gather(torch.tensor([newest]), "checkpoints")[0])
        return None if step < 0 else step

    def discard_after(self, step: int) -> None:
        self._on_first(lambda: super(ShardedCheckpoints, self).discard_after(step))

    def _check_mine(self, step: int) -> None:
        """Raises Damaged for wrong content in this process's share of the files."""
        with self._damage():
            found = self._described(step)
            sums = (
                {f: p["crc32"] for f, p in found["parts"].items()}
                if "parts" in found
                else {TENSORS: found.get("crc32")}
            )
            share = sorted(sums)[self.world.place :: self.world.size]
            self._check_sums(step, {file: sums[file] for file in share})

    def _make(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def _written(self, step: int, written: Future[None]) -> None:
        try:
            written.result()
        except (OSError, SafetensorError) as e:
            intact = f"; step {self.steps()[-1]} is intact" if self.steps() else ""
            raise UserError(f"{file_error(self.path(step), e, then='then continue with --resume')}{intact}") from e

    def _publish(self, step: int, described: dict[str, Any]) -> None:
        folder = self._temporary(step)
        try:
            described["parts"] = take_descriptions(folder)
            (folder / STATE).write_text(strict_json.dumps(described))
            for written in (*folder.iterdir(), folder):
                force_to_disk(written)
            folder.rename(self.path(step))
            force_to_disk(self.directory)
        except OSError as e:
            raise file_error(self.path(step), e, then="then continue with --resume") from e
        self._prune()

    def _temporary(self, step: int) -> Path:
        return self.directory / f".writing-step-{step}"

    def _say(self, value: bool) -> list[bool]:
        """What each process says."""
        return [bool(t) for t in self.world.gather(torch.tensor([int(value)]), CHECKPOINT)]

    def _first_says(self, value: bool) -> bool:
        return self._say(value)[0]

    def _on_first(self, work: Callable[[], None]) -> None:
        """The first process does it; the others wait, and raise where it raises."""
        self._together(work if self.world.place == 0 else lambda: None)

    def _together(self, work: Callable[[], None]) -> None:
        """Do it on all processes; where one raises, all raise."""
        error: UserError | None = None
        try:
            work()
        except UserError as e:
            error = e
        failed = [rank for rank, bad in enumerate(self._say(error is not None)) if bad]
        if error is not None:
            raise error
        if failed:
            raise UserError(f"rank {failed[0]} could not take part in a checkpoint: its own output says why")


def _one_file(slices: Mapping[str, Slice]) -> dict[str, Any]:
    """The description of a checkpoint that one process wrote: all tensors are whole."""
    return {TENSORS: {"rows": {name: [own.shape[0], 0] for name, own in slices.items()}}}
