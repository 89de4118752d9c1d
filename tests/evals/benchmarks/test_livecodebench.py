"""LiveCodeBench on a made-up problem in the published format, private tests packed as they are there."""

import base64
import json
import pickle
import zlib

import pytest

from rorqual.errors import UserError
from rorqual.evals.benchmarks.livecodebench import last_block
from rorqual.evals.benchmarks.pickled_text import packed_text
from rorqual.evals.tasks import open_task


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def cases(*pairs, kind="stdin"):
    return json.dumps([{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs])


SUM = {
    "question_title": "Sum", "question_content": "Print the sum of two numbers.", "platform": "atcoder",
    "question_id": "abc1_a", "contest_id": "abc1", "contest_date": "2024-09-01T00:00:00", "starter_code": "",
    "difficulty": "easy", "public_test_cases": cases(("1 2\n", "3\n")),
    "private_test_cases": packed(cases(("3 4\n", "7\n"), ("1\n2\n", "3"))), "metadata": "{}",
}  # fmt: skip
PAIRS = SUM | {
    "starter_code": "class Solution:\n    def pairs(self, items: List[int], k: int) -> List[int]:\n        ",
    "public_test_cases": cases(("[1, 2, 3]\n2", "[2, 4, 6]"), kind="functional"),
    "private_test_cases": cases(("[]\n5", "[]"), kind="functional"), "metadata": '{"func_name": "pairs"}',
    "contest_date": "2025-02-01T00:00:00", "difficulty": "hard",
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("lcb") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (SUM, PAIRS)))
    return open_task("livecodebench", data=str(path))


def test_prompts(task):
    stdin, call = task.problems(9, 0)
    start = (
        "You will be given a question (problem specification) and will generate a correct Python program that matches "
        "the specification and passes all tests.\n\nQuestion: Print the sum of two numbers.\n\n"
    )
    assert stdin.question.startswith(f"{start}Read the inputs from stdin solve the problem and write the answer")
    assert stdin.question.endswith("writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n")
    assert call.question == (
        f"{start}You will use the following starter code to write the solution to the problem and enclose your code "
        f"within delimiters.\n```python\n{PAIRS['starter_code']}\n```\n\n"
    )
    assert [p.difficulty for p in (stdin, call)] == ["easy", "hard"]


LOOKS_IT_UP = """
import re, sys
given, frame, seen = open(0).read(), sys._getframe(), ""
while frame:
    seen += repr([frame.f_globals, frame.f_locals])
    frame = frame.f_back
print(*re.findall(re.escape(repr(given)) + ", '([0-9])", seen)[:1])
"""
READ = "a, b = map(int, open(0).read().split())\n"
STDIN = {
    f"{READ}print(a + b)": True,
    "import sys\nprint(sum(map(int, sys.stdin.read().split())))": True,
    "import os\nprint(sum(map(int, os.read(0, 99).split())))": True,
    f"{READ}import sys\nsys.stdout.buffer.write(b'%d\\n' % (a + b))\nexit()": True,
    f"{READ}print(f'{{a + b}}.0  ')": True,  # equal as numbers
    f"{READ}print(a + b, file=__import__('sys').stderr)": False,
    "print(3)": False,  # the public test only
    "a, b = map(int, input().split())\nprint(a + b)": False,  # fails the last test
    f"{READ}print(a - b)": False,
    f"{READ}print(a + b)\nprint()\nprint(1)": False,
    "import sys\nsys.exit(0)": False,
    "import os\nos._exit(0)": False,
    "def broken(:": False,
    LOOKS_IT_UP: False,
    f"{READ}import sys\nsys.stdout = open('out', 'w')\nprint(a + b)": False,
    f"{READ}print(a + b)\nprint('a warning', file=__import__('sys').stderr)": True,
    f"{READ}import os\nos.write(1, b'0\\n')\nprint(a + b)": False,
}
CALLS = {
    "class Solution:\n    def pairs(self, items: List[int], k):\n        return [k * i for i in items]": True,
    "def pairs(items, k):\n    return tuple(k * i for i in items)": True,
    "class Solution:\n    def pairs(self, items, k):\n        return [2 * i for i in items][:2]": False,
    "def pairs(items, k):\n    print('[]')\n    return [k * i for i in items]": True,
    "def pairs(items, k):\n    return type('Same', (list,), {'__eq__': lambda *_: True})()": False,
    "def pairs(items, k):\n    return {k * i for i in items}": False,
    "class Solution:\n    def other(self, items, k):\n        return [k * i for i in items]": False,
}


def test_verdicts(task):
    stdin, call = task.problems(9, 0)
    problems = [stdin] * len(STDIN) + [call] * len(CALLS)
    codes = STDIN | CALLS
    found = task.score(problems, [f"So:\n```python\n{code}\n```\n" for code in codes], [None] * len(codes))
    assert [code for code, ok in zip(codes, found, strict=True) if ok != codes[code]] == []
    assert task.answer(stdin, "", "```\n1\n```") is None


def test_the_last_block_counts_and_thinking_does_not():
    assert last_block("<think>```python\n1\n```</think>\n```python\n2\n```\nor\n```python\n3\n```") == "3"
    assert last_block("```python\nprint(1)") == last_block("<think>```\n1\n```") == last_block("print(1)") == ""


def test_contests_of_a_period(task):
    def chosen(options):
        return [p.difficulty for p in open_task(f"livecodebench:{options}", data=task.data).problems(9, 0)]

    assert chosen("start=2024-08-01,end=2025-01-31") == chosen("end=2024-09-01") == ["easy"]
    assert chosen("start=2024-09-02") == ["hard"]
    with pytest.raises(UserError, match="has no problem for livecodebench"):
        chosen("end=2024-08-31")


def test_nothing_is_unpickled(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    for value in (Evil(), ["text"], 5, b"bytes", {"a": "b"}):
        with pytest.raises(ValueError, match=r"pickle with|0 strings"):
            packed_text(packed(value))
    assert not ran.exists()
    for text in ("", "é" * 300, "x" * 70_000):
        assert packed_text(packed(text)) == text
    for broken in ("no base64!", base64.b64encode(b"no zlib").decode(), packed("text")[:-8]):
        with pytest.raises(ValueError, match=r"neither JSON|cut off"):
            packed_text(broken)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SUM | {"private_test_cases": packed(["no text"])}, "field private_test_cases cannot be read: a pickle with"),
        (SUM | {"public_test_cases": "[{}]"}, "field public_test_cases is no list of tests"),
        (SUM | {"metadata": "7"}, "field metadata is no JSON object"),
        ({k: v for k, v in SUM.items() if k != "question_content"}, "field question_content is missing"),
    ],
)
def test_broken_rows_are_one_sentence(row, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        open_task("livecodebench", data=str(tmp_path / "d.jsonl")).problems(9, 0)
    assert "\n" not in str(caught.value)


def test_a_date_that_is_none():
    with pytest.raises(UserError, match="livecodebench: start = 'soon' is no date; write it as 2024-08-01"):
        open_task('livecodebench:start="soon"')
