"""What --dry-run shows is what the run reads."""

import json

import pytest

from rorqual.errors import UserError
from rorqual.recipe import DistillRecipe, RLRecipe, parse_recipe
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rl_run import prompt_tokens
from rorqual.rl.shown_prompts import first_prompts, worked_sample
from rorqual.rl.worked_samples import worked_tokens

DIGITS = '''
def digits(number: int) -> int:
    """Count digits."""
    return len(str(number))

class Digits:
    tools = [digits]
    problems = [{"question": f"How many digits has {n}?", "answer": len(str(n))} for n in range(100, 300)]

    def worked(self, problem):
        number = int("".join(filter(str.isdigit, problem["question"])))
        answer = problem["answer"] + self.off
        return [("", "digits", {"number": number}), f"<answer>{answer}</answer>"]

    def __init__(self, off=0):
        self.off = off
'''
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def recipe(tmp_path, kind, **fields):
    (tmp_path / "digits.py").write_text(DIGITS)
    config = fields.pop("config", {})
    section = {"name": "digits", "python": f"{tmp_path}/digits.py:Digits", "config": config}
    raw = {"name": "x", "model": {"path": "unused"}, "environments": [section], "seed": 1}
    return parse_recipe(raw | fields, kind)


def test_the_first_prompt_of_a_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    rl = recipe(tmp_path, RLRecipe, steps=1)
    environments = [open_environment(section) for section in rl.environments]
    (shown,) = first_prompts(rl, tokenizer, environments)
    head, *lines = shown.splitlines()
    text = "\n".join(line.removeprefix("    ") for line in lines)
    assert text.startswith("[digits]<user>How many digits has ")
    assert text.endswith("?\n<assistant>")
    tokens = len(tokenizer(text).input_ids)
    assert head == f"digits, the first prompt of {tokens} tokens:"
    # The plan counts the tools' descriptions too: all questions have three digits, so prompts are about as long.
    assert prompt_tokens(rl, tokenizer, environments) == pytest.approx(tokens, abs=2)
    assert tokens > len(tokenizer(text.removeprefix("[digits]")).input_ids)


def test_a_worked_solution_with_its_call_and_result(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    worked = {"teacher": "worked-solutions", "train": {"epochs": 1}}
    distill = recipe(tmp_path, DistillRecipe, **worked)
    head, *lines = worked_sample(distill, tokenizer).splitlines()
    number = "".join(filter(str.isdigit, lines[0]))
    call = json.dumps({"number": int(number)})
    assert lines[1:] == [f"    <assistant>digits{call}", "    <tool>3", "    <assistant><answer>3</answer>"]
    tokens = len(tokenizer("\n".join(line.removeprefix("    ") for line in lines)).input_ids) + 1  # the last newline
    assert head.startswith(f"digits, a worked solution of {tokens} tokens, ")
    assert worked_tokens(distill, tokenizer) == pytest.approx(tokens, abs=2)
    with pytest.raises(UserError, match="none of the worked solutions of 8 problems is right"):
        worked_sample(recipe(tmp_path, DistillRecipe, **worked, config={"off": 1}), tokenizer)
