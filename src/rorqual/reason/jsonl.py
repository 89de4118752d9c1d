"""Question/answer pairs from a .jsonl, .jsonl.gz or .parquet file, checked by math-verify."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from rorqual.data.corpus import read_records
from rorqual.errors import UserError
from rorqual.reason.problems import Environment, Problem, PromptFormat, integers, number_key, text_key
from rorqual.reason.worker import shared_worker
from rorqual.recipe import EnvironmentSection

TIMEOUT = 5.0  # seconds for one comparison


class JsonlEnvironment(Environment):
    """One record each with `question`, `answer` and, if wanted, `difficulty` and fields for the prompt."""

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)
        places, rows = [], []
        for where, row in _rows(Path(section.path)):
            places.append(where)
            rows.append(row)
        if not rows:
            raise UserError(f"{section.path} has no lines; write one JSON object with question and answer a line")
        prompt = None
        if section.prompt is not None:
            shared = set.intersection(*(set(row) for row in rows)) - {"answer"}
            prompt = PromptFormat(section.prompt, shared, section.name)
        self._problems = [_problem(row, prompt, section.name, where) for where, row in zip(places, rows, strict=True)]
        self._orders: dict[tuple[int, int], list[int]] = {}

    def candidate_count(self) -> int:
        return len(self._problems)

    def candidate(self, seed: int, index: int) -> Problem:
        epoch, place = divmod(index, len(self._problems))
        if (seed, epoch) not in self._orders:
            order = list(range(len(self._problems)))
            Random(f"{seed}/{epoch}").shuffle(order)
            self._orders = {(seed, epoch): order}  # one epoch is alive at a time
        return self._problems[self._orders[seed, epoch][place]]

    def everything(self) -> list[Problem]:
        """All problems in the file's order."""
        return list(self._problems)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when math-verify finds the answer equal to the right one within the time-out, else 0."""
        return math_equal(problem.answer, answer)


def math_equal(gold: str, answer: str, timeout: float = TIMEOUT) -> float:
    """1.0 if math-verify calls the two equal, 0.0 if not or if it takes more than `timeout` seconds.

    math-verify's own time-outs need signals and so the main thread; here a worker process is killed instead.
    """
    if answer.strip() == gold.strip():
        return 1.0
    result = shared_worker().call({"task": "math", "gold": gold, "answer": answer[:2000]}, timeout)
    return 0.0 if result is None else float(result)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a JSONL file of question/answer pairs")
    for where, row in read_records(path):
        for name in ("question", "answer"):
            if isinstance(row.get(name), bool) or not isinstance(row.get(name), str | int | float):
                raise UserError(f"{where}: field {name} is missing or not text; add it")
        yield where, row


def _problem(row: dict[str, Any], prompt: PromptFormat | None, family: str, where: str) -> Problem:
    question = str(row["question"])
    numbers = integers(question)
    return Problem(
        question=prompt(row) if prompt else question,
        answer=str(row["answer"]),
        key=number_key(numbers) if numbers else text_key(question),
        difficulty=str(row.get("difficulty", "")),
        family=family,
        where=where,
        metadata=row,
    )
