"""Environment of questions and answers in the user's file: .jsonl, .jsonl.gz, .json (a list) or .parquet."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rorqual.data.corpus import RECORDS, find_files, named, read_records
from rorqual.errors import UserError, file_error
from rorqual.files import read_text
from rorqual.judge import judge
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.code_tests import passes, read_program, read_tests
from rorqual.rl.envs.environment import Environment, Problem, PromptFormat, Shuffled, integers, number_key, text_key
from rorqual.sandbox.run_program import isolation
from rorqual.strict_json import Json
from rorqual.unicode_checks import whole_inside

SUFFIXES = (*RECORDS, ".json")
# The first of these fields that a record has: names differ among benchmarks.
QUESTION = ("question", "problem", "prompt")
ANSWER = ("answer", "target", "solution")
TESTS = "tests"


class JsonlEnvironment(Environment):
    """Records with a question, an answer or `tests`, and optionally `difficulty` and fields for the prompt.

    A record with `tests` asks for a program, which is right if it passes all of them in the sandbox (code_tests.py).
    Of an open environment a question is enough: no rule says which answers are right.
    Raises UserError, with file and line, for a record without a usable question or answer, and where there are tests
    but programs cannot be isolated.
    """

    remedy = "add lines to its file"

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)
        if section.config:
            raise UserError(
                f"environment {section.name}: {section.path} is a file, which has no config "
                f"({', '.join(section.config)}); remove it"
            )
        assert section.path is not None
        self.open = section.open
        rows = [(where, _checked(where, row, section.open)) for where, row in _records(section.path)]
        if not rows:
            raise UserError(f"{section.path} has no lines; write one JSON object with question and answer per line")
        prompt = None
        if section.prompt is not None:
            shared = [name for name in rows[0][1] if name != "answer" and all(name in row for _, row in rows)]
            prompt = PromptFormat(section.prompt, shared, section.name)
            for where, row in rows:
                if empty := next((name for name in prompt.names if row[name] is None), None):
                    raise UserError(f"{where}: field {empty} is null, and the prompt of {section.name} uses it; add it")
        self._problems = [_problem(row, prompt, section, where) for where, row in rows]
        self._shuffled = Shuffled(self._problems)
        self.runs_programs = not self.open and any(TESTS in problem.metadata for problem in self._problems)
        if self.runs_programs:
            isolation()

    def candidate_count(self) -> int:
        return len(self._problems)

    def candidate(self, seed: int, index: int) -> Problem:
        return self._shuffled.candidate(seed, index)

    def all_problems(self) -> list[Problem]:
        """All problems in the file's order."""
        return list(self._problems)

    def read(self, problem: Problem, text: str) -> str | None:
        """The answer in a completion; the program, of a problem with tests."""
        return read_program(text) if TESTS in problem.metadata else super().read(problem, text)

    def check(self, problem: Problem, answer: str) -> float:
        """1 where the judge finds the answer equal to the reference and not copied from the question, or where the
        program passes all tests; else 0.
        """
        if TESTS in problem.metadata:
            return float(passes(answer, problem.metadata[TESTS]))
        copied = judge.copies(problem.question, problem.answer, answer)
        return float(not copied and judge.same_answer(problem.answer, answer))


def _records(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, record) of every file that the path or glob matches."""
    for file in find_files(pattern, SUFFIXES):
        yield from _listed(file) if named(file, ".json") else read_records(file)


def _listed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows: Json = json.loads(read_text(path))
    except FileNotFoundError as e:
        raise file_error(path, e, "read") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); name it .jsonl if it has one object per line") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds a {type(rows).__name__}, not a list; write a list of objects with question and answer"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number} holds a {type(row).__name__}, not a JSON object; correct it")
        yield f"{path}, entry {number}", row


def _checked(where: str, row: dict[str, Any], open: bool) -> dict[str, Any]:
    """The record with its question and answer as text, under the names `question` and `answer`; an open one's answer is
    a field like others.
    """
    if open:
        name, question = _field(where, row, QUESTION)
        return _whole(where, {key: value for key, value in row.items() if key != name} | {"question": question})
    if TESTS in row:
        row = row | {TESTS: read_tests(row[TESTS], where)}
        row.setdefault(next((name for name in ANSWER if name in row), ANSWER[0]), "a program")
    (question_name, question), (answer_name, answer) = (_field(where, row, names) for names in (QUESTION, ANSWER))
    rest = {name: value for name, value in row.items() if name not in (question_name, answer_name)}
    checked = rest | {"question": question, "answer": judge.final_answer(answer)}
    if not checked["answer"]:
        raise UserError(f"{where}: there is no answer after #### or in \\boxed ({answer[-20:]!r}); add it")
    return _whole(where, checked)


def _whole(where: str, checked: dict[str, Any]) -> dict[str, Any]:
    if broken := [name for name, value in checked.items() if not whole_inside([name, value])]:
        raise UserError(f"{where}: field {broken[0]!r} contains a lone surrogate (half a character); correct it")
    return checked


def _field(where: str, row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, str]:
    """Name and text of the first of `names` that the record has."""
    name = next((name for name in names if name in row), None)
    if name is None:
        other = ", or set open = true for prompts without a right answer" if names is ANSWER else ""
        raise UserError(
            f"{where}: field {names[0]} is missing (it may also be called {' or '.join(names[1:])}); add it{other}"
        )
    value = row[name]
    if isinstance(value, bool) and names is ANSWER:
        return name, str(value)
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and (isinstance(value, int) or math.isfinite(value))):
        found = "null" if value is None else value if number else f"a {type(value).__name__}"
        raise UserError(f"{where}: field {name} is {found}, not text or a number; correct it")
    text = str(value)
    if not text.strip():
        raise UserError(f"{where}: field {name} is empty; add it")
    return name, text


def _problem(row: dict[str, Any], prompt: PromptFormat | None, section: EnvironmentSection, where: str) -> Problem:
    question = row["question"]
    # Those of a program's task, or of an open prompt, do not tell it from another.
    numbers = [] if TESTS in row or section.open else integers(question)
    difficulty = row.get("difficulty")
    return Problem(
        question=prompt(row) if prompt else question,
        answer="" if section.open else row["answer"],
        key=number_key(numbers) if numbers else text_key(question),
        difficulty="" if difficulty is None else str(difficulty),
        family=section.name,
        where=where,
        metadata=row,
    )
