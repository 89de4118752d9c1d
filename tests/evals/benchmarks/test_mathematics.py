"""AIME, MATH-500 and GSM8K on made-up problems in the published formats."""

import json

import pytest

from rorqual.errors import UserError
from rorqual.evals.tasks import open_task

BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def verdicts(task, problem, texts):
    answers = [task.answer(problem, "", text) for text in texts]
    return task.score([problem] * len(texts), texts, answers)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


AIME = {"id": 60, "problem": "Find $x$ with $x+1=26$.", "solution": "It is \\boxed{025}.", "answer": "025",
        "url": "https://example.org", "year": "2024"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aime24", AIME),
        ("aime24", {"ID": "2024-I-1", "Problem": AIME["problem"], "Solution": "", "Answer": 25}),
        ("aime25", {"id": 1, "problem": AIME["problem"], "answer": "25"}),
        ("gsm8k", {"question": AIME["problem"], "answer": "26 minus 1 is <<26-1=25>>25.\n#### 25"}),
        ("math500", {"problem": AIME["problem"], "solution": "…", "answer": "25", "subject": "Algebra", "level": 2,
                     "unique_id": "test/algebra/1.json"}),
    ],
)  # fmt: skip
def test_prompts_and_verdicts(name, row, tmp_path):
    task = open_task(name, data=written(tmp_path / "data.jsonl", row))
    (problem,) = task.problems(9, 0)
    assert (task.name, task.split) == (name, "all")
    assert problem.question == f"{AIME['problem']}\n{BOX}"
    right = ["<think>\n24?</think>So it is \\boxed{25}.", "\\boxed{025}", "The answer is 25.", "x = \\boxed{x = 25}"]
    wrong = ["<think>\n\\boxed{25}", "\\boxed{24}", "", "I do not know.", "\\boxed{25} or \\boxed{26}"]
    assert verdicts(task, problem, right + wrong) == [True] * len(right) + [False] * len(wrong)


def test_answers_that_are_no_integers(tmp_path):
    rows = [("\\frac{3}{4}", "\\boxed{0.75}"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}"),
            ("\\text{Evelyn}", "\\boxed{Evelyn}"), ("10\\sqrt{2}", "\\boxed{\\sqrt{200}}")]  # fmt: skip
    data = written(tmp_path / "m.jsonl", *({"problem": f"Question {i}?", "answer": a} for i, (a, _) in enumerate(rows)))
    task = open_task("math500", data=data)
    problems, texts = task.problems(9, 0), [text for _, text in rows]
    assert (
        task.score(problems, texts, [task.answer(p, "", t) for p, t in zip(problems, texts, strict=True)]) == [True] * 4
    )
    shifted = texts[1:] + texts[:1]
    answers = [task.answer(p, "", t) for p, t in zip(problems, shifted, strict=True)]
    assert task.score(problems, shifted, answers) == [False] * 4


def test_levels_group_results_and_a_seed_chooses(tmp_path):
    rows = [{"problem": f"Number {i}?", "answer": str(i), "level": i % 3} for i in range(30)]
    task = open_task("math500", data=written(tmp_path / "m.jsonl", *rows))
    assert [p.answer for p in task.problems(99, 0)] == [str(i) for i in range(30)]
    assert {p.difficulty for p in task.problems(99, 0)} == {"0", "1", "2"}
    assert task.problems(5, 1) == task.problems(5, 1) != task.problems(5, 2)


def test_other_kinds_of_files(tmp_path):
    rows = [{"problem": "One?", "answer": "1"}, {"problem": "Two?", "answer": "2"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "table.csv").write_text('problem,answer\n"One?",1\n"Two?","2"\n')
    for name in ("list.json", "lines.json", "table.csv"):
        assert [p.answer for p in open_task("aime25", data=str(tmp_path / name)).problems(9, 0)] == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "One?"}', r"d\.jsonl, line 1: field answer is missing \(there are problem\); aime25 reads"),
        ('{"problem": "", "answer": 1}', r"d\.jsonl, line 1: field problem is empty"),
        ('{"problem": "One?", "answer": [1]}', r"d\.jsonl, line 1: field answer is a list, not text"),
        ('{"problem": "One?", "answer": 1', r"d\.jsonl, line 1 is not valid JSON"),
        ("[1]", r"d\.jsonl, line 1 holds a list, not a JSON object"),
        ("", r"d\.jsonl has no problem for aime25; give its published data"),
        ('{"problem": "\\ud800", "answer": 1}', r"d\.jsonl, line 1 contains a lone surrogate"),
    ],
)
def test_broken_files_are_one_sentence(text, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        open_task("aime25", data=str(tmp_path / "d.jsonl")).problems(9, 0)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_wrong_kind(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist; check the path"):
        open_task("gsm8k", data=str(tmp_path / "none.jsonl")).problems(1, 0)
    (tmp_path / "data.xlsx").write_text("?")
    with pytest.raises(UserError, match=r"data\.xlsx is none of .*\.csv; convert or rename it"):
        open_task("gsm8k", data=str(tmp_path / "data.xlsx")).problems(1, 0)


@pytest.mark.parametrize("data", [None, "someone/gsm"])
def test_the_hub_is_asked_and_its_absence_one_sentence(data, monkeypatch):
    import datasets

    asked = []

    def load(name, config=None, split=None):
        asked.append((name, config, split))
        if len(asked) > 1:
            raise ConnectionError("Couldn't reach the Hub.\nTraceback")
        return [{"question": "One?", "answer": "so\n#### 1"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_task("gsm8k", data=data).problems(9, 0)[0].answer == "1"
    with pytest.raises(UserError) as caught:
        open_task("gsm8k", data=data).problems(9, 0)
    name = data or "openai/gsm8k"
    assert asked == [(name, None if data else "main", "test")] * 2
    assert str(caught.value) == (
        f"{name} cannot be read from the Hugging Face Hub (Couldn't reach the Hub); "
        "give a local file of the published data: --data gsm8k=PATH"
    )
