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


ADD = "def add(x: int, y: int):\n    return x + y\n"
WRONG = ADD.replace("+", "-")
RIGHT_ANSWERS = {
    "python3": f"Here:\n```python3\n{ADD}```\n",
    "Python": f"```Python\n{ADD}```",
    "py": f"```py\n{ADD}```",
    "no language": f"```\n{ADD}```",
    "attributes": f"```{{.python}}\n{ADD}```\n",
    "a title": f'```python title="add.py"\n{ADD}```\n',
    "CR LF": f"Here:\n```python\n{ADD}```\n".replace("\n", "\r\n"),
    "tildes": f"~~~python\n{ADD}~~~\n",
    "four backticks": f"````python\n{ADD}````\n",
    "an indented fence": "1. So:\n\n   ```python\n   def add(x, y):\n       return x + y\n   ```\n",
    "fence behind words": f"Here: ```python\n{ADD}```",
    "closed on the line": "```python\ndef add(x, y):\n    return x + y```",
    "never closed": f"```python\n{ADD}",
    "the whole prompt again": None,  # below
    "spaces before brackets": "```python\ndef add (x, y):\n    return x + y\n```",
    "an assignment": "```python\nadd = lambda x, y: x + y\n```",
    "body only": "```python\n    return x + y\n```",
    "body without indentation": "```python\nresult = x + y\nreturn result\n```",
    "first line without indentation": "```python\nresult = x + y\n    return result\n```",
    "body, then a try": "```python\n    return x + y\n```\nTry it:\n```bash\npython add.py\n```",
    "the last of two": f"```python\n{WRONG}```\nBetter:\n```python\n{ADD}```",
    "a helper in a block before": "```python\ndef plus(a, b):\n    return a + b\n```\nand\n"
    "```python\ndef add(x, y):\n    return plus(x, y)\n```",
    "output after it": f"```python\n{ADD}```\nOutput:\n```\n5\n```\n",
    "a main block": f"```python\n{ADD}\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n```",
    "wrong asserts of its own": f"```python\n{ADD}\nassert add(1, 2) == 4\nprint(add(1))\n```",
    "an example": f"```python\n{ADD}\nresult = add(1, undefined)\n```",
    "imports": "```python\nimport operator\nfrom functools import reduce\n\ndef add(x, y):\n"
    "    return reduce(operator.add, (x, y))\n```",
    "a cached function": "```python\nimport functools\n@functools.cache\ndef add(x, y):\n    return x + y\n"
    "add = functools.cache(add)\n```",
    "a table filled before": "```python\nT = {}\nfor i in range(3):\n    T[i] = i\n"
    "def add(x, y):\n    return x + y + T[0]\n```",
    "no fence": ADD,
    "prose around, no fence": f"Sure! Here it is:\n\n{ADD}\nThis adds the two numbers.\n",
    "a continuation": "    return x + y\n",
    "a continuation, then more": "    return x + y\n\n\ndef broken(:\n",
    "thinking": f"<think>```python\n{WRONG}```</think>```python\n{ADD}```",
    "no-break spaces": "```python\ndef add(x, y):\n\u00a0\u00a0\u00a0\u00a0return x + y\n```",
}
WRONG_ANSWERS = {
    "wrong": f"```python\n{WRONG}```",
    "the last of two": f"```python\n{ADD}```\nNo:\n```python\n{WRONG}```",
    "thinking only": f"<think>```python\n{ADD}```</think>I cannot.",
    "thinking without end": f"<think>```python\n{ADD}```",
    "another language": "```javascript\nfunction add(x, y) { return x + y }\n```",
    "another name": "```python\ndef plus(x, y):\n    return x + y\n```",
    "cut off": "```python\ndef add(x, y):\n    return (x +",
    "prose": "Add the two numbers.",
    "nothing": "",
    "an early exit": "```python\nimport sys\ndef add(x, y):\n    sys.exit(0)\n```",
    "brackets without end": "```python\n" + "(" * 50_000 + "\n```",
}


def test_the_function_is_found_in_every_form_and_in_no_other(task):
    problem = load()[53]
    answers = RIGHT_ANSWERS | {"the whole prompt again": f"```python\n{problem.question}    return x + y\n```"}
    texts = [*answers.values(), *WRONG_ANSWERS.values()]
    passed = task.score([problem] * len(texts), texts, [None] * len(texts))
    verdicts = dict(zip([*answers, *(f"not {name}" for name in WRONG_ANSWERS)], passed, strict=True))
    assert [name for name in answers if not verdicts[name]] == []
    assert [name for name in WRONG_ANSWERS if verdicts[f"not {name}"]] == []


def test_a_whole_function_keeps_the_prompts_imports(task):
    problem = load()[0]  # from typing import List
    assert judge(task, problem, f"```python\n{problem.question.partition('List')[2] and ''}"
                                f"def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
                                f"{problem.answer}```")  # fmt: skip


def test_a_continuation_is_cut_where_the_function_ends(task):
    assert judge(task, load()[53], "    return x + y\n\nprint(undefined)\n")


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
