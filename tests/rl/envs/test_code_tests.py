import json

import pytest

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection, RewardSection
from rorqual.rl.envs.code_tests import passes, read_program, read_tests
from rorqual.rl.envs.environment import Sample
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rewards import score

DOUBLE = ["assert double(2) == 4", "assert double('a') == 'aa'"]
SQUARE = [{"stdin": "3\n", "stdout": "9\n"}, {"input": "-2", "output": "4"}]
LOOKS_IT_UP = """
import re, sys
frame, seen = sys._getframe(), ""
while frame:
    seen += repr([frame.f_code.co_consts, frame.f_globals, frame.f_locals])
    frame = frame.f_back
print(*re.findall("70[0-9]1", seen)[:1])
"""


@pytest.mark.parametrize(
    ("program", "tests", "verdict"),
    [
        ("def double(x):\n    return x + x", DOUBLE, True),
        ("def double(x):\n    return 2 * int(x)", DOUBLE, False),
        ("def double(x):\n    return x + x\nimport sys\nsys.exit(0)", DOUBLE, False),
        ("print(int(input()) ** 2)", SQUARE, True),
        ("import sys\nprint(int(sys.stdin.read()) ** 2, '')\nsys.exit()", SQUARE, True),
        ("print(9)", SQUARE, False),
        ("if __name__ == '__main__':\n    print(int(input()) ** 2)", SQUARE, True),
        ("print(int(input()) ** 2", SQUARE, False),
        ("import sys\nsys.stdout.buffer.write(b'%d' % (int(sys.stdin.buffer.read()) ** 2))", SQUARE, True),
        ("import sys\nprint(int(open(0).read()) ** 2)\nprint('a warning', file=sys.stderr)", SQUARE, True),
        ("print('a' * 3000000)", [{"stdin": "", "stdout": "a" * 3_000_000}], True),  # what is expected is allowed
        ("print('a' * 3000000)", [{"stdin": "", "stdout": "a"}], False),
        (LOOKS_IT_UP, [{"stdin": "1", "stdout": "7041"}], False),
    ],
)
def test_verdicts(program, tests, verdict):
    assert passes(program, read_tests(tests, "here")) == verdict


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>```python\n1\n```</think>So:\n```python\n2\n```\nor\n~~~\n3\n~~~\n", "3\n"),
        ("<think>a</think><answer>```py\n4\n```</answer>", "4\n"),
        ("<answer>5</answer>", "5"),
        ("6", "6"),
        ("<think>7", None),
        ("<think>a</think> ", None),
    ],
)
def test_the_program_in_a_completion(text, program):
    found = read_program(text)
    assert (found and found.strip()) == (program and program.strip())


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "must be a list of asserts"),
        ("assert 1", "must be a list of asserts"),
        (["assert ("], "test 1 is not Python"),
        (["assert 1", {"stdin": "1"}], "test 2: must be an assert, or an object with stdin and stdout"),
    ],
)
def test_tests_that_cannot_be_read(tests, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        read_tests(tests, "here")


def test_a_file_of_programs(tmp_path):
    path = tmp_path / "programs.jsonl"
    rows = [{"question": "Write double.", "tests": DOUBLE}, {"question": "What is 1 + 1?", "answer": "2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = open_environment(EnvironmentSection(name="programs", path=str(path)))
    write, add = environment.all_problems()
    samples = [
        Sample(write, "```python\ndef double(x):\n    return x * 2\n```", 9, False),
        Sample(write, "```python\ndef double(x):\n    return x\n```", 9, False),
        Sample(add, "<answer>2</answer>", 9, False),
    ]
    found = score(samples, {"programs": environment}, RewardSection(), 100)
    assert found.correct.tolist() == [True, False, True]
