import json

import pytest

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection
from rorqual.rl.context_limits import check_context
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.prompts import render

CHAIN = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}


def write(path, questions):
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    return EnvironmentSection(name="mine", path=str(path))


@pytest.mark.parametrize("template", ["plain", "r1-zero"])
def test_a_long_question_of_a_file_is_named_with_its_line(tokenizer, tmp_path, template):
    questions = [f"{n} and {n}?" for n in range(20)]
    room = max(len(render(q, template, tokenizer)) for q in questions)
    section = write(tmp_path / "a.jsonl", questions)
    check_context([open_environment(section)], template, tokenizer, room + 8, 8, "grpo.max_tokens")  # just fits
    with pytest.raises(UserError, match=r"a\.jsonl, line \d+: the prompt has \d+ tokens .*grpo\.max_tokens = 9"):
        check_context([open_environment(section)], template, tokenizer, room + 8, 9, "grpo.max_tokens")
    section = write(tmp_path / "a.jsonl", [*questions, "so " * 200, "1", "on " * 200])
    with pytest.raises(UserError, match=r"a\.jsonl, line 21: .*1 more problems are too long.*shorten") as error:
        check_context([open_environment(section)], template, tokenizer, room + 8, 8, "grpo.max_tokens")
    assert str(len(render("so " * 200, template, tokenizer))) in str(error.value)


@pytest.mark.parametrize("answer", [100, 101])
def test_an_answer_as_long_as_the_context(tokenizer, answer):
    with pytest.raises(UserError, match=rf"max_tokens = {answer} leaves no space for a prompt: .* holds 100"):
        check_context([], "plain", tokenizer, 100, answer, "max_tokens")


def test_generated_problems_that_do_not_fit_are_passed_over(tokenizer, capsys):
    section = EnvironmentSection(name="chain_sum", config=CHAIN, prompt="{expression}")
    free, held = open_environment(section), open_environment(section)
    lengths = [len(render(p.question, "plain", tokenizer)) for p in free.problems("train", 40)]
    room = sorted(lengths)[20]
    check_context([held], "plain", tokenizer, room + 10, 10, "max_tokens")
    problems = held.problems("train", 40)
    assert all(len(render(p.question, "plain", tokenizer)) <= room for p in problems)
    stream = held.stream("train", 1)
    assert all(len(render(next(stream).question, "plain", tokenizer)) <= room for _ in range(60))
    assert [p for p in free.problems("train", 20) if p in problems]  # those that fit are the same
    assert capsys.readouterr().err.count("are skipped") == 1


def test_generated_problems_none_of_which_fits(tokenizer):
    environment = open_environment(EnvironmentSection(name="chain_sum", config=CHAIN))
    check_context([environment], "plain", tokenizer, 20, 10, "max_tokens")
    with pytest.raises(UserError, match="environment chain_sum: none of 200 prompts leaves space for max_tokens = 10"):
        next(environment.stream("train", 1))
