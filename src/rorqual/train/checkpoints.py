"""Resumable checkpoints: run_dir/checkpoints/step-N/{tensors.safetensors, state.json}.

Writing is atomic (files.write_folder). A checkpoint is removed only once newer ones replace it. An unreadable one stays
in place; a provably damaged one is renamed to damaged-step-N. Other files in the folder are left alone.

Several processes write a file each (sharded_checkpoints.py); any number of processes reads them.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual import strict_json
from rorqual.errors import UserError, file_error
from rorqual.files import check_link, discard, write_folder
from rorqual.train.checkpoint_parts import Damaged, crc32, read_parts

TENSORS, STATE = "tensors.safetensors", "state.json"
NAME = re.compile(r"step-(0|[1-9][0-9]*)")
LEFTOVER = re.compile(r"\.(writing|deleting|going)-step-[0-9]+")


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class Checkpoints:
    """Keeps the last `keep` checkpoints of a run and the best one."""

    def __init__(self, run_dir: Path, keep: int, notify: Callable[[str], None] = to_stderr) -> None:
        """`notify` receives one sentence for each checkpoint that was set aside or could not be removed."""
        self.directory, self.keep, self.notify = Path(run_dir) / "checkpoints", keep, notify

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        found = [NAME.fullmatch(path.name) for path in self._entries() if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], score: float | None = None,
        good: bool = True,
    ) -> None:  # fmt: skip
        """Write a checkpoint, then delete those no longer kept.

        `score`: lower is better; a non-finite one counts as none. `good` False (a step with a non-finite loss): it does
        not count among the last `keep`. A step already saved is not rewritten. Raises UserError when the checkpoint
        cannot be written or a tensor is not finite; earlier checkpoints stay intact.
        """
        final = self.path(step)
        if final.exists():
            return
        self._check_finite(step, tensors)
        try:
            with write_folder(final) as folder:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
                described = {
                    "step": step, "score": score if is_score(score) else None, "good": good,
                    "crc32": crc32(folder / TENSORS), "state": state,
                }  # fmt: skip
                (folder / STATE).write_text(strict_json.dumps(described))
        except (OSError, SafetensorError) as e:
            intact = f"; step {self.steps()[-1]} is intact" if self.steps() else ""
            raise UserError(f"{file_error(final, e, then='then continue with --resume')}{intact}") from e
        self._prune()

    def poll(self) -> None:
        """End a checkpoint that was being written, where it can be done without waiting."""

    def finish(self) -> None:
        """Wait until all checkpoints are whole."""

    def load_latest(self, good: bool = False) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint, or `good` one, as (step, tensors, state); None where none was ever written.

        Damaged ones are set aside. Raises UserError for one that cannot be read, and when all are damaged.
        """
        self._discard_leftovers()
        for step in self._newest_first(good):
            try:
                return step, *self._read(step)
            except Damaged as e:
                self._set_aside(step, e)
            except OSError as e:
                raise file_error(e.filename or self.path(step), e, "read", "then continue with --resume") from e
        self._check_not_all_damaged()
        return None

    def discard_after(self, step: int) -> None:
        """Delete all later ones: the run has gone back to `step`, on another path."""
        for later in self.steps():
            if later > step:
                self._remove(later)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest score."""
        return _best(self._readable())

    @contextmanager
    def reject_other_version(self, step: int) -> Iterator[None]:
        """Context in which a missing or wrong entry of the checkpoint raises UserError."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
            what = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"{self.path(step)} does not fit ({what}): another version wrote it; continue with that version, or "
                "start again under another name"
            ) from e

    def _entries(self) -> list[Path]:
        try:
            return list(self.directory.iterdir())
        except FileNotFoundError:
            return []
        except OSError as e:
            raise file_error(self.directory, e, "read", "then continue with --resume") from e

    def _read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Raises Damaged for wrong or missing content, OSError when it cannot be read."""
        with self._damage():
            found = self._described(step)
            sums = {TENSORS: found.get("crc32")} if "parts" not in found else {}
            self._check_sums(step, sums | {file: part["crc32"] for file, part in found.get("parts", {}).items()})
            if "parts" in found:
                return read_parts(self.path(step), found["parts"]), found["state"]
            return load_file(self.path(step) / TENSORS), found["state"]

    def _discard_leftovers(self) -> None:
        """Of processes that were killed."""
        for entry in self._entries():
            if LEFTOVER.fullmatch(entry.name):
                discard(entry)
            elif NAME.fullmatch(entry.name):
                check_link(entry)

    def _check_not_all_damaged(self) -> None:
        damaged = sorted(p.name for p in self._entries() if p.name.startswith("damaged-step-"))
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({', '.join(damaged)}); restore one as step-N from a "
                "copy, or start again under another name"
            )

    def _described(self, step: int) -> dict[str, Any]:
        """state.json."""
        check_link(self.path(step) / STATE)
        found = json.loads((self.path(step) / STATE).read_bytes())
        if not isinstance(found["state"], dict):
            raise Damaged(f"{STATE} has no state")
        return found

    def _check_sums(self, step: int, sums: Mapping[str, int | None]) -> None:
        """Raises Damaged for a file without its CRC-32; None: it has none, since an earlier version wrote it."""
        for file, right in sums.items():
            check_link(self.path(step) / file)
            if crc32(self.path(step) / file) != right and right is not None:
                raise Damaged(f"{file} is not what was written")

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Context in which wrong content raises Damaged."""
        try:
            yield
        except FileNotFoundError as e:
            raise Damaged(f"{Path(e.filename or TENSORS).name} is missing") from e
        except SafetensorError as e:
            raise Damaged(f"{TENSORS}: {e}") from e
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise Damaged(f"{STATE} is not what was written") from e

    def _set_aside(self, step: int, why: Damaged) -> None:
        number, place = 1, self.directory / f"damaged-step-{step}"
        while place.exists():
            number += 1
            place = self.directory / f"damaged-step-{step}-{number}"
        try:
            os.replace(self.path(step), place)
        except OSError as e:
            raise file_error(self.path(step), e, "set aside", "then continue with --resume") from e
        self.notify(f"{self.path(step)} is damaged ({why}); it is kept as {place.name}, and an earlier one is used")

    def _readable(self) -> dict[int, dict[str, Any]]:
        """Step → state.json, of the checkpoints where it can be read."""
        found = {}
        for step in self.steps():
            try:
                state = json.loads((self.path(step) / STATE).read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(state, dict):
                found[step] = state
        return found

    def _newest_first(self, good: bool) -> list[int]:
        """Steps of the complete checkpoints, or of those that are good or cannot be read."""
        states = self._readable() if good else {}
        return [step for step in reversed(self.steps()) if states.get(step, {}).get("good", True)]

    def _prune(self) -> None:
        """Remove readable checkpoints except the last `keep` good ones, all later ones and the best."""
        readable = self._readable()
        best = _best(readable)
        good = [step for step, found in readable.items() if found.get("good", True)]
        first = good[-self.keep :][0] if good else 0
        for step in readable:
            if step < first and step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first, so that an interrupted deletion never looks like a checkpoint.
        deleting = self.directory / f".deleting-step-{step}"
        discard(deleting)  # of a deletion that was interrupted
        try:
            os.replace(self.path(step), deleting)
        except OSError as e:
            self.notify(f"{file_error(self.path(step), e, 'removed')}; the run goes on")
            return
        discard(deleting)

    def _check_finite(self, step: int, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                steps = self.steps()
                last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
                raise UserError(
                    f"{self.path(step)}: {name} is not finite, so it is not saved and training stops; {last}; lower "
                    "optimizer.lr or look at the data"
                )


def is_score(score: Any) -> bool:
    return strict_json.is_finite(score)


def _best(states: dict[int, dict[str, Any]]) -> int | None:
    scored = {step: found["score"] for step, found in states.items() if is_score(found.get("score"))}
    return min(scored, key=lambda step: scored[step]) if scored else None
