"""Problems whose answer is a Python program, which is right if it passes tests in the sandbox.

Tests are Python statements that hold after the program (`assert f(1) == 2`), or objects {"stdin", "stdout"} (or
"input", "output"): what the program reads, and what it then has to print, but for spaces at the ends of lines. What is
printed is compared outside the sandbox. Statements run in the program's own process, so a program that looks for them
there, or returns an object that is equal to everything, can please them.
"""

import re
from dataclasses import replace
from typing import cast

from rorqual.errors import UserError
from rorqual.sandbox.run_program import Limits, run_program
from rorqual.strict_json import Json
from rorqual.unicode_checks import whole_inside

Test = str | tuple[str, str]  # statements, or what is read and what is printed
BLOCK = re.compile(r"(?ims)^(`{3,}|~{3,})[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^\1[ \t]*$")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NAMES = (("stdin", "input"), ("stdout", "output"))
OUTPUT = 1 << 20  # bytes that a program may print beyond those expected
# stdin is a file at descriptor 0, so that open(0) and sys.stdin.buffer work too.
WITH_INPUT = """
import io, os, sys
with open("given", "w", encoding="utf-8") as file:
    file.write({read!r})
descriptor = os.open("given", os.O_RDONLY)
if descriptor:
    os.dup2(descriptor, 0)
    os.close(descriptor)
sys.stdin, sys.stderr = open(0, encoding="utf-8", closefd=False), io.StringIO()
try:
    exec(compile({program!r}, "answer.py", "exec"), {{"__name__": "__main__"}})
except SystemExit as e:
    assert not e.code, e.code
"""


def read_tests(value: object, where: str) -> list[Test]:
    """A record's `tests`. Raises UserError, which begins with `where`, for anything but a list of tests."""
    if not isinstance(value, list) or not value or not whole_inside(cast("list[Json]", value)):
        raise UserError(f"{where}: tests must be a list of asserts, or of objects with stdin and stdout; correct it")
    return [_test(test, f"{where}: test {n}") for n, test in enumerate(cast("list[object]", value), 1)]


def _test(value: object, where: str) -> Test:
    if isinstance(value, str):
        try:
            compile(value, where, "exec")
        except (SyntaxError, ValueError) as e:
            raise UserError(f"{where} is not Python ({e}); correct it") from None
        return value
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    given, expected = (next((fields[name] for name in names if name in fields), None) for names in NAMES)
    if not isinstance(given, str) or not isinstance(expected, str):
        raise UserError(f"{where}: must be an assert, or an object with stdin and stdout as text; correct it")
    return given, expected


def read_program(text: str) -> str | None:
    """The program in a completion: of its `<answer>`, or of what follows its thinking, the last block of code, or all
    where there is none. None where there is no text, or thinking that does not end.
    """
    thinking, closed, reply = text.replace("\r\n", "\n").partition("</think>")
    if not closed:
        if "<think>" in thinking:
            return None
        reply = thinking
    answers = ANSWER.findall(reply)
    reply = answers[-1] if answers else reply
    blocks = BLOCK.findall(reply)
    program = blocks[-1][1] if blocks else reply
    return program if program.strip() else None


def passes(program: str, tests: list[Test], limits: Limits | None = None) -> bool:
    """Whether a program passes all tests, each with input in a run of its own."""
    statements = "\n".join(test for test in tests if isinstance(test, str))
    if statements and not run_program(f"{program}\n\n{statements}\n", limits).passed:
        return False
    return all(_prints(program, *test, limits or Limits()) for test in tests if not isinstance(test, str))


def _prints(program: str, given: str, expected: str, limits: Limits) -> bool:
    limits = replace(limits, output_bytes=len(expected.encode()) + OUTPUT)
    outcome = run_program(WITH_INPUT.format(program=program, read=given), limits)
    return outcome.passed and _lines(outcome.output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
