import json
import threading
import time

import pytest

from rorqual.errors import UserError
from rorqual.reason.environment import open_environment
from rorqual.reason.jsonl import math_equal
from rorqual.reason.worker import Worker
from rorqual.recipe import EnvironmentSection


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def environment(path, **fields):
    return open_environment(EnvironmentSection(name="mine", path=str(path), **fields))


@pytest.fixture
def many(tmp_path):
    return write(tmp_path / "q.jsonl", [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(300)])


def test_splits_are_disjoint_and_complete(many):
    source = environment(many)
    parts = {s: source.problems(s, n) for s, n in (("train", 200), ("dev", 20), ("test", 15))}
    questions = [p.question for part in parts.values() for p in part]
    assert len(set(questions)) == len(questions) == 235
    with pytest.raises(UserError, match=r"only \d+ exist"):
        source.problems("test", 300)


def test_a_stream_goes_round_in_new_order_and_resumes(many):
    source = environment(many)
    stream = source.stream("train", seed=1)
    first = [next(stream).question for _ in range(500)]
    size = len({*first})
    assert 220 < size < 260
    assert first[:50] != first[size : size + 50]
    assert {*first[:size]} == {*first}
    resumed = environment(many).stream("train", seed=1, index=stream.index)
    assert [next(stream).question for _ in range(50)] == [next(resumed).question for _ in range(50)]


def test_answers_are_compared_by_value(many):
    source = environment(many)
    problem = source.problems("train", 1)[0]
    value = int(problem.answer)
    assert source.correct(problem, f"{value}.0")
    assert source.correct(problem, rf"\frac{{{2 * value}}}{{2}}")
    assert not source.correct(problem, str(value + 1))
    assert not source.correct(problem, "no idea")


def test_prompt_over_the_fields_all_lines_have(tmp_path):
    path = write(
        tmp_path / "q.jsonl", [{"question": "2+2", "answer": "4", "unit": "m"}, {"question": "3", "answer": "3"}]
    )
    assert {environment(path, prompt="Q: {question}").candidate(0, i).question for i in (0, 1)} == {"Q: 2+2", "Q: 3"}
    for field in ("unit", "answer"):
        with pytest.raises(UserError, match=f"prompt field {{{field}}} is unknown"):
            environment(path, prompt="{" + field + "}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "1", "answer": "1"}, "{broken"], r"q.jsonl, line 2 is not valid JSON"),
        ([{"question": "1", "answer": "1"}, "", [1]], r"q.jsonl, line 3 holds a list, not a JSON object"),
        ([{"question": "1"}], r"line 1: field answer is missing"),
        ([{"question": ["1"], "answer": "1"}], r"line 1: field question is missing or not text"),
        ([], r"has no lines"),
    ],
)
def test_broken_lines_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as error:
        environment(write(tmp_path / "q.jsonl", rows))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        environment(tmp_path / "none.jsonl")


def test_equal_in_any_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(math_equal("1/2", "0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_a_comparison_that_hangs_is_given_up_and_the_next_one_works():
    hang = "!".join(["(" * 3 + "9" * 9] + [")"] * 3)  # 999999999!!! as LaTeX, which sympy tries to write out
    math_equal("1", "2")  # the process is up
    start = time.monotonic()
    assert math_equal("1", f"${hang}$", timeout=1.0) == 0.0
    assert 1.0 <= time.monotonic() - start < 3.0
    assert math_equal("1/2", "0.5") == 1.0


def test_a_worker_that_is_killed_starts_anew():
    worker = Worker()
    request = {"task": "math", "gold": "1/2", "answer": "0.5"}
    assert worker.call(request, 20.0) == 1.0
    worker._process.kill()
    worker._process.wait()
    assert worker.call(request, 20.0) == 1.0
    worker.close()
