import gzip
import json
import threading
import time
from pathlib import Path

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.registry import open_environment
from rorqual.sandbox.checker import CheckerProcess


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


BROKEN = [
    ([{"question": "1", "answer": "1"}, "{broken"], r"q.jsonl, line 2 is not valid JSON"),
    ([{"question": "1", "answer": "1"}, "", [1]], r"q.jsonl, line 3 holds a list, not a JSON object"),
    ([{"question": "1"}], r"line 1: field answer is missing \(it may also be called target or solution\)"),
    ([{"answer": "1"}], r"line 1: field question is missing"),
    ([{"question": ["1"], "answer": "1"}], r"line 1: field question is a list, not text"),
    ([{"question": None, "answer": "1"}], r"line 1: field question is null"),
    ([{"question": "1", "answer": None}], r"line 1: field answer is null"),
    ([{"question": "1", "answer": {"value": 1}}], r"line 1: field answer is a dict"),
    ([{"question": "1", "answer": ["1", "2"]}], r"line 1: field answer is a list"),
    (['{"question": "1", "answer": NaN}'], r"line 1: field answer is nan, not text or a number"),
    (['{"question": "1", "answer": 1e999}'], r"line 1: field answer is inf"),
    ([{"question": True, "answer": "1"}], r"line 1: field question is a bool"),
    ([{"question": " ", "answer": "1"}], r"line 1: field question is empty"),
    ([{"question": "1", "answer": ""}], r"line 1: field answer is empty"),
    ([{"question": "1", "answer": "6 * 7 = 42\n####  "}], r"line 1: there is no answer after ####"),
    (
        ['{"question": "1", "answer": "1"}', '{"question": "\\ud800", "answer": "1"}'],
        "line 2: field 'question' contains a lone surrogate",
    ),
    (['{"question": "1", "answer": "x\\udc00"}'], "line 1: field 'answer' contains a lone surrogate"),
    (['{"question": "1", "answer": "1", "unit": "\\udc00"}'], "line 1: field 'unit' contains a lone surrogate"),
    ([], r"has no lines"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_broken_lines_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as error:
        environment(write(tmp_path / "q.jsonl", rows))
    assert "\n" not in str(error.value)


NOT_PROBLEMS = [
    ("q.txt", "words", r"q.txt is none of \.jsonl, \.jsonl\.gz, \.parquet, \.json; convert"),
    ("q.csv", "words", r"q.csv is none of \.jsonl"),
    ("set/state.json", "{}", r"set is a saved dataset, which only pretrain reads; write it as a file, .* to_parquet"),
    ("some/q.jsonl", "{}", r"some is a directory but not a saved dataset; name the files"),
    ("q.json", b"\xff", r"q.json, line 1 is not UTF-8 text .*; save the file as UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), NOT_PROBLEMS)
def test_what_holds_no_problems(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        environment(path if path.parent == tmp_path else path.parent)


def test_lists_as_powershell_writes_them_and_several_at_once(tmp_path):
    for name in "ab":
        rows = [{"question": f"{name} {i}", "answer": "1"} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-16")
    assert [p.question for p in environment(tmp_path / "*.json").all_problems()][2:4] == ["a 2", "b 0"]


def test_numbers_beyond_floats(tmp_path):
    """JSON's integers have no end: 2 to the 2000th is an answer."""
    rows = [{"question": "2^2000", "answer": 2**2000}, {"question": 10**400, "answer": "1"}]
    mine = environment(write(tmp_path / "q.jsonl", rows))
    first, second = mine.all_problems()
    assert mine.correct(first, str(2**2000))
    assert not mine.correct(first, str(2**2000 + 1))
    assert second.question == str(10**400)


def test_a_field_that_the_prompt_needs_is_not_null(tmp_path):
    rows = [{"question": "1", "answer": "1", "unit": "m"}, {"question": "2", "answer": "2", "unit": None}]
    with pytest.raises(UserError, match=r"line 2: field unit is null, and the prompt of mine uses it"):
        environment(write(tmp_path / "q.jsonl", rows), prompt="{question} in {unit}")
    with pytest.raises(UserError, match=r"prompt '\{question:d\}' cannot be filled"):
        environment(tmp_path / "q.jsonl", prompt="{question:d}")


ROWS = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(5)]


def as_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_gzip(path):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


FORMATS = {
    "q.jsonl": lambda path: write(path, ROWS),
    "q.jsonl.gz": as_gzip,
    "q.parquet": as_parquet,
    "q.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "mark.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS)),
    "crlf.jsonl": lambda path: path.write_bytes("\r\n\r\n".join(map(json.dumps, ROWS)).encode()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_problems(tmp_path, name):
    FORMATS[name](tmp_path / name)
    assert [(p.question, p.answer) for p in environment(tmp_path / name).all_problems()] == [
        (row["question"], str(row["answer"])) for row in ROWS
    ]


def test_a_glob_names_files_of_any_format(tmp_path):
    for name in ("a.JSON", "b.parquet", "c.JSONL"):
        FORMATS[f"q{Path(name).suffix.lower()}"](tmp_path / name)
    assert len(environment(tmp_path / "*").all_problems()) == 3 * len(ROWS)
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(UserError, match=r"d\.txt is none of \.jsonl, .*; convert or rename it"):
        environment(tmp_path / "*")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds a dict, not a list"),
        ("[1]", "entry 1 holds a int"),
        ('{"question": "1"}\n{"question": "2"}', "is not valid JSON .* name it .jsonl"),
        ("[" * 100_000, "is not valid JSON"),
        ('[{"question": "1", "answer": "\\udc00"}]', "entry 1: field 'answer' contains a lone surrogate"),
    ],
)
def test_a_list_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(UserError, match=message):
        environment(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"problem": "1+1", "answer": 2}, "1+1", "2"),
        ({"prompt": "1+1", "target": "2"}, "1+1", "2"),
        ({"problem": "1+1", "solution": r"So $1+1 = \boxed{2}$.", "answer": "2"}, "1+1", "2"),
        ({"problem": "1+1", "solution": r"So $1+1 = \boxed{\frac{4}{2}}$."}, "1+1", r"\frac{4}{2}"),
        ({"question": "1+1", "answer": "1 and 1 is <<1+1=2>>2.\n#### 2"}, "1+1", "2"),
        ({"question": "1+1", "answer": 2.0}, "1+1", "2.0"),
        ({"question": "1+1", "answer": -2}, "1+1", "-2"),
        ({"question": "Is it so?", "answer": True}, "Is it so?", "True"),
    ],
)
def test_what_question_and_answer_are_called(tmp_path, row, question, answer):
    (problem,) = environment(write(tmp_path / "q.jsonl", [row])).all_problems()
    assert (problem.question, problem.answer) == (question, answer)


def test_equal_questions_keep_their_own_answers(tmp_path):
    rows = [{"question": "Which?", "answer": "a1"}, {"question": "Which?", "answer": "b2"}]
    source = environment(write(tmp_path / "q.jsonl", rows))
    first, second = source.all_problems()
    assert source.correct(first, "a1")
    assert not source.correct(second, "a1")


def test_the_question_itself_is_no_answer(tmp_path):
    rows = [{"question": "What is 6*4?", "answer": 24}, {"question": "Which is more, 1/2 or 1/3?", "answer": "1/2"}]
    product, half = environment(write(tmp_path / "q.jsonl", rows)).all_problems()
    source = environment(tmp_path / "q.jsonl")
    assert not source.correct(product, "6*4")
    assert not source.correct(product, r"$6 \times 4$")
    assert source.correct(product, "24")
    assert source.correct(product, "12+12")
    assert source.correct(half, "1/2")


def test_a_file_takes_no_config(tmp_path):
    with pytest.raises(UserError, match=r"is a file, which has no config \(size\)"):
        environment(write(tmp_path / "q.jsonl", ROWS), config={"size": 3})


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        environment(tmp_path / "none.jsonl")


def integral(n):
    return {"task": "math", "gold": rf"\int_0^{n} x\,dx", "answer": r"1/2"}


def test_a_comparison_that_hangs_is_given_up_and_the_next_one_works():
    worker = CheckerProcess()
    hang = "!".join(["(" * 3 + "9" * 9] + [")"] * 3)  # 999999999!!! as LaTeX, which sympy tries to write out
    assert worker.call(integral(1), 60.0) == 1.0  # the process is up
    start = time.monotonic()
    assert worker.call({"task": "math", "gold": "1", "answer": f"${hang}$"}, 1.0) is None
    assert 1.0 <= time.monotonic() - start < 3.0
    assert worker.call(integral(1), 60.0) == 1.0
    worker.close()


def test_a_worker_that_is_killed_starts_anew_in_any_thread():
    worker, found = CheckerProcess(), []
    before = psutil.Process().children()
    assert worker.call(integral(2), 60.0) == 0.0
    (process,) = set(psutil.Process().children()) - set(before)
    process.kill()
    process.wait()
    thread = threading.Thread(target=lambda: found.append(worker.call(integral(1), 60.0)))
    thread.start()
    thread.join()
    assert found == [1.0]
    worker.close()
