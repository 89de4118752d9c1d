"""The folder of `rorqual eval --out`: every finished batch of answers is kept, so that an evaluation goes on after a
kill.

    evaluation.json        the settings, and when the evaluation began
    answers/TASK.jsonl     a line per problem: its number and its samples
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rorqual.errors import UserError, file_error
from rorqual.evals.collected import Collected, Sample
from rorqual.files import locked, read_json, write_text
from rorqual.rl.envs.environment import Problem

BATCH = 256  # sequences at least, as many as the engine decodes at a time


class OutFolder:
    """settings: whatever the answers follow from; a folder with other ones is refused (UserError)."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._file = path / "evaluation.json"
        given = json.loads(json.dumps(settings))
        try:
            kept = read_json(self._file, "remove the folder, or give another --out")
        except FileNotFoundError:
            kept = {"began": time.time(), "settings": given}
            try:
                (path / "answers").mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise file_error(path, e) from e
            write_text(self._file, json.dumps(kept, indent=1), "run the same command again")
        if not isinstance(kept, dict) or not isinstance(before := kept.get("settings"), dict):
            raise UserError(f"{self._file} is not of rorqual eval; give another --out")
        self.began = float(str(kept.get("began", 0)))
        for name in dict.fromkeys([*given, *before]):
            if before.get(name) != given.get(name):
                raise UserError(
                    f"{path} was begun with {name} = {_shown(before.get(name))}, not {_shown(given.get(name))}; "
                    "give the same settings to continue it, or another --out"
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the folder. Raises UserError where one holds it."""
        with locked(self.path / "lock", f"another evaluation writes to {self.path}"):
            yield

    def collect(
        self,
        name: str,
        problems: list[Problem],
        prompts: list[str],
        samples: int,
        sample: Callable[[int, int], Collected],
        skipped: Callable[[int], None],
    ) -> Collected:
        """Answers to all problems of a task, from the file as far as it goes; `sample(a, b)` makes those of [a, b).

        The batches are always the same ones, so that an interrupted evaluation ends with the same answers. skipped:
        receives the count of completions that the file had.
        """
        path = self.path / "answers" / f"{file_name(name)}.jsonl"
        size = -(-BATCH // samples)  # problems a batch
        kept = self._read(path, len(problems), samples, size)
        skipped(len(kept))
        every = kept
        for start in range(len(kept) // samples, len(problems), size):
            made = sample(start, min(start + size, len(problems))).samples
            self._append(path, start, made, samples)
            every = every + made
        return Collected(problems, prompts, every)

    def _read(self, path: Path, problems: int, samples: int, size: int) -> list[Sample]:
        """The samples of the whole batches in a file; what follows them, of a kill amid a write, is cut off."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as e:
            raise file_error(path, e, "read") from e
        lines = raw.splitlines(keepends=True)
        whole = sum(line.endswith(b"\n") for line in lines)
        count = whole if whole >= problems else whole // size * size
        found: list[Sample] = []
        try:
            for number, line in enumerate(lines[:count]):
                row = json.loads(line)
                if row["problem"] != number or len(row["samples"]) != samples:
                    raise ValueError(f"line {number + 1} is of another problem")
                found += [_sample(part) for part in row["samples"]]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged ({e}); remove it, and its answers are sampled again") from e
        length = sum(map(len, lines[:count]))
        if length < len(raw):
            os.truncate(path, length)
        return found

    def _append(self, path: Path, start: int, made: list[Sample], samples: int) -> None:
        lines = [
            json.dumps({"problem": start + i, "samples": [_row(s) for s in made[i * samples : (i + 1) * samples]]})
            for i in range(len(made) // samples)
        ]
        try:
            with path.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise file_error(path, e, then="run the same command again; what is kept stays") from e


def file_name(task: str) -> str:
    """A task's name as a file name; names that differ stay different."""
    safe = re.sub(r"[^\w.-]+", "_", task)
    return safe if safe == task else f"{safe}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def weights_fingerprint(model: Path) -> str:
    """A hash of names, sizes and times of a model's files, which differs once they are written anew."""
    files = [model] if model.is_file() else sorted(f for f in model.iterdir() if f.is_file())
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _row(sample: Sample) -> dict[str, Any]:
    """Without what only episodes of several turns have, in other samples."""
    found = asdict(sample)
    return found if sample.turns is not None else {k: v for k, v in found.items() if k not in ("turns", "messages")}


def _sample(row: Mapping[str, Any]) -> Sample:
    parts = {name: (int(points), int(most)) for name, (points, most) in row["parts"].items()}
    return Sample(**{**row, "parts": parts})


def _shown(value: object) -> str:
    return "unset" if value is None else json.dumps(value)
