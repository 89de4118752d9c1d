"""LiveCodeBench, code generation (arXiv 2403.07974): programs that read stdin, or functions, checked by tests."""

import datetime
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, cast

from rorqual.cores import usable_cores
from rorqual.errors import UserError
from rorqual.evals.benchmarks.benchmark import Benchmark, reply
from rorqual.evals.benchmarks.pickled_text import packed_text
from rorqual.evals.benchmarks.sources import HubData, Row, Rows, read_rows
from rorqual.rl.envs.environment import Problem
from rorqual.sandbox.run_program import Limits, isolation, run_program

# lcb_runner/prompts/code_generation.py, the prompt for DeepSeek-R1.
QUESTION = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\nQuestion: {question}\n\n"
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters.\n```python\n{starter}\n```\n\n"
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
)
SECONDS = 6  # a test, as published

OUTPUT = 16 << 20  # bytes that a program may say beyond those expected

# Runs in the sandbox, and says of each test, on a line of JSON, what the program printed or returned; up to the first
# one that it does not end in time. A program's stdin is a file at descriptor 0, so that open(0) and os.read work too.
RUNNER = """
import io, json, os, signal, sys

code, inputs, name, seconds = json.loads({given!r})
modules = ("string re datetime collections heapq bisect copy math random statistics itertools functools operator io "
           "sys json").split()
prelude = "".join(f"from {{m}} import *\\n" for m in [*modules, "builtins", "typing"])
prelude += "".join(f"import {{m}}\\n" for m in modules) + "sys.setrecursionlimit(50000)\\n"
program, real = compile(prelude + code, "answer.py", "exec"), sys.stdout
sys.stderr = io.StringIO()

def late(number, frame):
    raise TimeoutError("a test took too long")

signal.signal(signal.SIGALRM, late)

def printed(given):
    with open("given", "w", encoding="utf-8") as file:
        file.write(given)
    descriptor = os.open("given", os.O_RDONLY)
    if descriptor != 0:
        os.dup2(descriptor, 0)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    try:
        exec(program, {{"__name__": "__main__"}})
    except SystemExit:
        pass
    return out.buffer.getvalue().decode()

def returned(given):
    sys.stdout = io.StringIO()
    made = {{"__name__": "answer"}}
    exec(program, made)
    method = getattr(made["Solution"](), name) if "class Solution" in code else made[name]
    said = method(*[json.loads(line) for line in given.split("\\n")])
    return plain(list(said) if isinstance(said, tuple) else said)

def plain(value):
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value), "a key is no text"
        return {{key: plain(part) for key, part in value.items()}}
    assert value is None or isinstance(value, (bool, int, float, str)), "not what JSON has"
    return value

for given in inputs:
    signal.alarm(seconds)
    said = json.dumps(printed(given) if name is None else returned(given))
    signal.alarm(0)
    sys.stdout = real
    print(said, flush=True)
"""


class LiveCodeBench(Benchmark):
    """start, end: dates (YYYY-MM-DD) of the first and last contest that counts; by default all.

    An answer is the last fenced block, as published; it is correct if it passes all public and private tests, each
    within 6 seconds. What it prints or returns is compared outside the sandbox, so it cannot look up what is expected.
    A truncated completion is run too, as published. The constructor raises UserError where model code cannot be
    isolated.
    """

    name = "livecodebench"
    hub = HubData("livecodebench/code_generation_lite", files="test*.jsonl")
    judge = "all tests, in the sandbox"
    second_judge = "all tests again, with twice the time"

    def __init__(self, data: str | None = None, start: object = None, end: object = None) -> None:
        super().__init__(data)
        self.start, self.end = _date("start", start), _date("end", end)
        isolation()

    def local(self, path: str) -> Rows:
        return read_rows(f"{path}/test*.jsonl" if os.path.isdir(path) else path)

    def wanted(self, rows: Rows) -> Iterable[tuple[str, Row]]:
        for where, row in rows:
            if self.start is None and self.end is None:
                yield where, row
                continue
            day = _date("contest_date", self.text(where, row, "contest_date"))
            if day is not None and (self.start or day) <= day <= (self.end or day):
                yield where, row

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        starter, metadata = row.get("starter_code") or "", row.get("metadata") or "{}"
        question = QUESTION.format(question=self.text(where, row, "question_content"))
        question += WITH_STARTER.format(starter=starter) if starter else WITHOUT_STARTER
        try:
            name = json.loads(metadata).get("func_name")
        except (ValueError, AttributeError):
            raise UserError(f"{where}: field metadata is no JSON object as text; give the published file") from None
        tests = self._tests(where, row, "public_test_cases") + self._tests(where, row, "private_test_cases")
        return self.made(where, question, "", row.get("difficulty") or "", tests=tests, function=name)

    def _tests(self, where: str, row: Row, name: str) -> list[tuple[str, str]]:
        """(input, output) of the tests in a field: JSON, or packed."""
        text = self.text(where, row, name)
        try:
            found = json.loads(text if text.lstrip().startswith("[") else packed_text(text))
            return [(test["input"], test["output"]) for test in found]
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: field {name} cannot be read: {e}; give the published file") from None
        except (KeyError, TypeError):
            raise UserError(f"{where}: field {name} is no list of tests with input and output; correct it") from None

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """None: programs do not vote."""
        return None

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return self._run(problems, texts, SECONDS)

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        return self._run(problems, texts, 2 * SECONDS)

    def _run(self, problems: Sequence[Problem], texts: Sequence[str], seconds: int) -> list[bool]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(partial(_passes, seconds=seconds), problems, texts))


def last_block(text: str) -> str:
    """The lines between the last two that hold ```; "" where there are fewer (lcb_runner/utils/extraction_utils.py)."""
    lines = (reply(text) or "").split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def _passes(problem: Problem, text: str, seconds: int) -> bool:
    code, tests = last_block(text), cast("list[tuple[str, str]]", problem.metadata["tests"])
    if not code.strip():
        return False
    name = problem.metadata["function"]
    given = json.dumps([code, [test[0] for test in tests], name, seconds])
    whole = (seconds + 1) * len(tests) + 5  # of all tests, as published
    expected = sum(len(json.dumps(test[1])) for test in tests)
    limits = Limits(whole, whole, 4 * 2**30, file_bytes=64 * 2**20, output_bytes=expected + OUTPUT)
    outcome = run_program(RUNNER.format(given=given), limits)
    try:
        said = [json.loads(line) for line in outcome.output.splitlines()]
        same = _printed_alike if name is None else _equal
        return outcome.passed and len(said) == len(tests) and all(map(same, said, (test[1] for test in tests)))
    except (ValueError, RecursionError):  # the program wrote past the lines of JSON
        return False


def _printed_alike(said: object, wanted: str) -> bool:
    """Line by line, as text or as numbers."""
    if not isinstance(said, str):
        return False
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (said, wanted))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return [Decimal(word) for word in one.split()] == [Decimal(word) for word in other.split()]
    except InvalidOperation:
        return False


def _equal(said: object, wanted: str) -> bool:
    return said == json.loads(wanted)


def _date(name: str, value: Any) -> datetime.date | None:
    """A day; the CLI's options are TOML, which has dates."""
    if value is None or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    try:
        return datetime.datetime.fromisoformat(str(value)).date()
    except ValueError:
        raise UserError(f"livecodebench: {name} = {value!r} is no date; write it as 2024-08-01") from None
