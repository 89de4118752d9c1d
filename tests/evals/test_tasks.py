import json
from pathlib import Path

import pytest

from rorqual.errors import UserError
from rorqual.evals.tasks import open_task, split_tasks
from rorqual.recipe import EnvironmentSection


def test_a_name_with_options_configures_the_dataset():
    task = open_task("countdown:min_numbers=3,max_numbers=3")
    asked = task.problems(5, seed=0)
    assert {len(p.metadata["numbers"]) for p in asked} == {3}
    assert {p.split for p in asked} == {"test"}
    right = asked[0].metadata["expression"]
    assert task.score([asked[0]] * 3, [""] * 3, [right, "1", None]) == [True, False, False]


def test_no_test_problem_is_a_training_problem():
    task = open_task("countdown:min_numbers=3,max_numbers=3")
    test = {p.key for p in task.problems(200, seed=0)}
    train = {p.key for p in task.environment.problems("train", 2000, seed=0)}
    dev = {p.key for p in open_task("countdown:min_numbers=3,max_numbers=3", split="dev").problems(200, seed=0)}
    assert not test & train
    assert not test & dev
    assert test != {p.key for p in task.problems(200, seed=1)}


def test_a_dash_is_an_underscore():
    assert open_task("gsm-symbolic").environment.family == "gsm_symbolic"


def test_a_section_and_a_file_are_tasks(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i} + 1?", "answer": i + 1}) + "\n" for i in range(100)))
    for task in (open_task(str(path)), open_task(EnvironmentSection(name="mine", path=str(path)))):
        first = task.problems(3, seed=0)[0]
        assert task.score([first, first], ["", ""], [first.answer, "999"]) == [True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdwon", "is not a dataset of reasoning-gym"),
        ("countdown:min_numbers", "options are written name:option=value"),
        ("countdown:colour=3", "its fields are"),
        ("humaneval:n=3", "humaneval has no options"),
        ("mine.jsonl:option=1", r"a file has no options; write mine.jsonl"),
        ("mine.parquet:size=1", r"a file has no options; write mine.parquet"),
        ("folder/none.jsonl", "folder/none.jsonl does not exist"),
        ("folder/none", "folder/none does not exist"),
    ],
)
def test_bad_names_are_one_sentence(name, message):
    with pytest.raises(UserError, match=message) as caught:
        open_task(name)
    assert "\n" not in str(caught.value)


def rows_of(path, n=12, **fields):
    path.write_text(
        "".join(json.dumps({"question": f"What is {i}+1?", "answer": i + 1} | fields) + "\n" for i in range(n))
    )
    return path


def test_a_file_is_asked_whole_and_a_recipe_what_training_left_out(tmp_path):
    path = rows_of(tmp_path / "mine.jsonl", 300)
    whole = open_task(str(path))
    assert [p.answer for p in whole.problems(1000, seed=0)] == [str(i + 1) for i in range(300)]
    assert whole.problems(5, seed=1) == whole.problems(5, seed=1) != whole.problems(5, seed=2)
    assert whole.problems(5, seed=-1)
    held_out = open_task(EnvironmentSection(name="mine", path=str(path)))
    assert {p.split for p in held_out.problems(10, seed=0)} == {"test"}
    assert (whole.split, held_out.split) == ("all", "test")


def test_every_line_of_a_file_is_a_problem_also_where_two_ask_the_same(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Which?", "answer": "a1"}\n{"question": "Which?", "answer": "b2"}\n')
    task = open_task(str(path))
    asked = task.problems(9, seed=0)
    assert task.score(asked, ["", ""], ["a1", "a1"]) == [True, False]


@pytest.mark.parametrize("name", ["a,b.jsonl", "part:2.jsonl", "with space.jsonl", "[1].jsonl"])
def test_files_of_any_name(tmp_path, name):
    path = str(rows_of(tmp_path / name))
    (task,) = split_tasks(path)
    assert len(open_task(task).problems(99, seed=0)) == 12


def test_splitting_the_command_lines_tasks():
    assert split_tasks("countdown:min_numbers=3,max_numbers=3, gsm-symbolic,humaneval") == [
        "countdown:min_numbers=3,max_numbers=3",
        "gsm-symbolic",
        "humaneval",
    ]
    assert split_tasks('countdown:operators=["+","-"],chain_sum') == ['countdown:operators=["+","-"]', "chain_sum"]
    recipe = Path(__file__).parents[2] / "recipes" / "r1-zero-smollm2.toml"
    gym, *sections = split_tasks(f"chain_sum,{recipe}")
    assert gym == "chain_sum"
    assert [open_task(section).name for section in sections] == ["chain_sum", "basic_arithmetic"]
    with pytest.raises(UserError, match="empty task"):
        split_tasks("countdown,,humaneval")


def test_a_long_list_of_tasks_is_no_file_name():
    """No file's name has more than 255 bytes, and the system says so where one is looked for."""
    names = [f"chain_sum:min_terms={n},max_terms={n}" for n in range(2, 20)]
    assert split_tasks(",".join(names)) == names
    with pytest.raises(UserError, match="not a dataset of reasoning-gym"):
        open_task("x" * 300)


def test_a_file_of_another_kind_is_told_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text("question,answer")
    with pytest.raises(UserError, match=r"q\.csv is none of \.jsonl"):
        open_task("q.csv")
