"""GPQA, MMLU and MMLU-Pro on made-up questions in the published formats."""

import csv
import json

import pytest

from rorqual.errors import UserError
from rorqual.evals.tasks import open_task

PROMPT = """Answer the following multiple choice question. The last line of your response should be of the following \
format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.

Which whale filters water?

A) Sperm whale
B) Blue whale
C) Orca
D) Narwhal"""
CHOICES = ["Sperm whale", "Blue whale", "Orca", "Narwhal"]
MMLU = {"question": "Which whale filters water?", "subject": "zoology", "choices": CHOICES, "answer": 1}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verdicts(task, problem, texts):
    return task.score([problem] * len(texts), texts, [task.answer(problem, "", text) for text in texts])


def test_mmlu(tmp_path):
    task = open_task("mmlu", data=jsonl(tmp_path / "m.jsonl", MMLU))
    (problem,) = task.problems(9, 0)
    assert (problem.question, problem.answer, problem.difficulty) == (PROMPT, "B", "zoology")
    right = ["Answer: B", "It has baleen.\n\nAnswer: $B$", "**Answer:** B", "answer : b", "Answer: **B**",
             "<think>Answer: A</think>Answer: B", "Answer: \\boxed{B}", "Answer: B) Blue whale"]  # fmt: skip
    wrong = [
        "Answer: A",
        "B",
        "Answer: Because it does",
        "<think>Answer: B",
        "",
        "The answer is E",
        "Answer: A\nAnswer: B",
    ]
    assert verdicts(task, problem, right + wrong) == [True] * len(right) + [False] * len(wrong)


def test_mmlu_as_published_without_a_line_of_names(tmp_path):
    with (tmp_path / "zoology_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[MMLU["question"], *CHOICES, "B"], ["2, or\n3?", "1", "2", "3", "4", "C"]])
    first, second = open_task("mmlu", data=str(tmp_path / "*_test.csv")).problems(9, 0)
    assert (first.question, first.answer, second.answer) == (PROMPT, "B", "C")
    with (tmp_path / "mmlu.csv").open("w", newline="") as file:  # simple-evals' table
        csv.writer(file).writerows(
            [["Question", "A", "B", "C", "D", "Answer", "Subject"], [MMLU["question"], *CHOICES, "B", "zoology"]]
        )
    (only,) = open_task("mmlu", data=str(tmp_path / "mmlu.csv")).problems(9, 0)
    assert (only.question, only.answer, only.difficulty) == (PROMPT, "B", "zoology")


def test_gpqa_choices_are_shuffled_by_the_seed(tmp_path):
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        names = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
        rows = [[f"{MMLU['question']} ({i})", "Blue whale", "Sperm whale", "Orca", "Narwhal"] for i in range(40)]
        csv.writer(file).writerows([names, *rows])
    task = open_task("gpqa-diamond", data=str(tmp_path / "gpqa_diamond.csv"))
    problems = task.problems(99, 0)
    letters = [p.answer for p in problems]
    assert set(letters) == set("ABCD")
    assert all(f"{p.answer}) Blue whale" in p.question for p in problems)
    assert letters == [p.answer for p in task.problems(99, 0)] != [p.answer for p in task.problems(99, 1)]
    by_key = {p.question.splitlines()[2]: p.answer for p in problems}  # a question's order is its own, not its place's
    assert all(by_key[p.question.splitlines()[2]] == p.answer for p in task.problems(10, 0))


PRO = {"question_id": 7, "question": "Which whale filters water?", "options": [*CHOICES, "Beluga", "Dolphin"],
       "answer": "F", "answer_index": 5, "cot_content": "", "category": "biology", "src": ""}  # fmt: skip


def test_mmlu_pro(tmp_path):
    task = open_task("mmlu-pro", data=jsonl(tmp_path / "p.jsonl", PRO))
    (problem,) = task.problems(9, 0)
    assert problem.question == (
        "The following are multiple choice questions (with answers) about biology. Think step by step and then finish "
        'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\nQuestion:\n'
        "Which whale filters water?\nOptions:\nA. Sperm whale\nB. Blue whale\nC. Orca\nD. Narwhal\nE. Beluga\n"
        "F. Dolphin\nAnswer: Let's think step by step."
    )
    right = ["So the answer is (F).", "the answer is F", "Answer: F", "It must be F", "A and B are not; F is."]
    wrong = ["the answer is (A). F", "", "f", "<think>the answer is (F)"]
    assert verdicts(task, problem, right + wrong) == [True] * len(right) + [False] * len(wrong)


def test_the_second_judge_reads_what_the_published_one_does_not(tmp_path):
    task = open_task("mmlu", data=jsonl(tmp_path / "m.jsonl", MMLU))
    (problem,) = task.problems(9, 0)
    texts = ["\\boxed{B}", "The answer is **B**.", "The answer is Blue whale.", "The answer is Orca.", "<think>B"]
    assert verdicts(task, problem, texts) == [False] * 5
    assert task.second_score([problem] * 5, texts, [None] * 5) == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu", MMLU | {"choices": CHOICES[:3]}, "mmlu has 4 choices and an answer among them, not 3"),
        ("mmlu", MMLU | {"answer": 4}, "mmlu has 4 choices and an answer among them"),
        ("mmlu", MMLU | {"answer": None}, "field answer is missing"),
        ("mmlu-pro", PRO | {"answer": "J"}, "options is no list of up to 10 choices with 'J' among them"),
        ("gpqa-diamond", {"Question": "?"}, "field Correct Answer is missing"),
    ],
)
def test_broken_rows_are_one_sentence(name, row, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        open_task(name, data=jsonl(tmp_path / "d.jsonl", row)).problems(9, 0)
    assert str(caught.value).startswith(f"{tmp_path / 'd.jsonl'}, line 1: ")
