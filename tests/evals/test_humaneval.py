import pytest

from rorqual.errors import UserError
from rorqual.evals import humaneval
from rorqual.evals.humaneval import HumanEval, load


def judge(task, problem, text):
    return task.score([problem], [text], [None])[0]


@pytest.fixture(scope="module")
def task():
    return HumanEval()


def test_canonical_solutions_pass_and_wrong_ones_fail(task):
    problems = [load()[i] for i in (0, 2, 10, 38, 53)]  # 38 leans on a helper in its prompt
    assert all(task.score(problems, [p.answer for p in problems], [None] * 5))
    assert not any(task.score(problems, ["    return None\n"] * 5, [None] * 5))


@pytest.mark.slow
def test_all_canonical_solutions_pass(task):
    problems = load()
    assert len(problems) == 164
    passed = task.score(problems, [p.answer for p in problems], [None] * len(problems))
    assert [p.key for p, ok in zip(problems, passed, strict=True) if not ok] == []


def test_code_is_found_in_a_chat_answer(task):
    problem = load()[53]  # add(x, y)
    assert judge(task, problem, "<think>x + y?</think>Here:\n```python\ndef add(x, y):\n    return x + y\n```\nDone.")
    assert judge(task, problem, "Wrong first:\n```python\ndef add(x, y):\n    return 0\n```\n"
                                "```python\ndef add(x, y):\n    return x + y\n```")  # fmt: skip
    assert not judge(task, problem, "```python\ndef add(x, y):\n    return x - y\n```")


def test_a_whole_function_keeps_the_prompts_imports(task):
    problem = load()[0]  # from typing import List
    assert judge(task, problem, f"```python\n{problem.question.partition('List')[2] and ''}"
                                f"def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
                                f"{problem.answer}```")  # fmt: skip


def test_a_continuation_is_cut_where_the_function_ends(task):
    problem = load()[53]
    assert judge(task, problem, "    return x + y\n\n\ndef broken(:\n")
    assert judge(task, problem, "    return x + y\n\nprint(undefined)\n")


def test_the_programs_own_exit_does_not_pass(task):
    assert not judge(task, load()[53], "    import os; os._exit(0)\n")


def test_a_seeded_selection(task):
    assert task.problems(5, seed=1) == task.problems(5, seed=1) != task.problems(5, seed=2)
    assert len(task.problems(1000, seed=0)) == 164


def test_refused_where_code_cannot_be_isolated(monkeypatch):
    def refuse():
        raise UserError("model code cannot be isolated here")

    monkeypatch.setattr(humaneval, "isolation", refuse)
    with pytest.raises(UserError, match="cannot be isolated"):
        HumanEval()
