import json
from pathlib import Path

import pytest

from rorqual.errors import UserError
from rorqual.evals.tasks import open_task, read_answer, split_tasks
from rorqual.reason.environment import Problem
from rorqual.recipe import EnvironmentSection


def problem(answer):
    return Problem(question="?", answer=answer, key="", difficulty="", family="")


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
        ("humaneval:n=3", "humaneval takes no options"),
    ],
)
def test_bad_names_are_one_sentence(name, message):
    with pytest.raises(UserError, match=message) as caught:
        open_task(name)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("prompt", "text", "gold", "answer"),
    [
        ("Q", "<think>1+1</think><answer> 2 </answer>", "2", "2"),
        ("Q <think>", "1+1 is 2</think><answer>2</answer>", "2", "2"),
        ("Q <think>", "1+1 = 2", "2", None),
        ("Q <think>\n\n</think>\n", "<answer>2</answer>", "2", "2"),  # thinking left out by the prompt
        ("Q <think>\n\n</think>\n", "It is 2.", "2", "2"),
        ("Q", "<think>1+1</think> it is 2", "2", None),
        ("Q", "So 12 + 30 = 42.", "42", "42"),
        ("Q", "The answer is 1,234 apples, out of 2000.", "1234", "1234"),
        ("Q", r"Thus \boxed{x+1}", "x+1", "x+1"),
        ("Q", "The answer is **blue**.", "blue", "blue"),
        ("Q", "I do not know", "42", None),
        ("Q", "I do not know", "blue", None),
    ],
)
def test_reading_answers(prompt, text, gold, answer):
    assert read_answer(problem(gold), prompt, text) == answer
