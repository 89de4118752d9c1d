"""The pages have the figures that the planner computes now."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from rorqual.cli import entry

ROOT = Path(__file__).parents[2]


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look for it
    specification.loader.exec_module(module)
    return module


make_planning, make_five_million = script("make_planning"), script("make_five_million")


def test_the_table_is_up_to_date():
    assert make_planning.PAGE.read_text(encoding="utf-8") == make_planning.page(), "run python docs/make_planning.py"


def test_bills_are_within_a_tenth():
    """V3's 180 K hours a trillion tokens and 119 K for longer contexts (V3, table 1)."""
    assert make_planning.v3_hours(1e12, 4096, 15360) == pytest.approx(180e3, rel=0.1)
    assert make_planning.extension_hours() == pytest.approx(119e3, rel=0.1)


def test_r1s_second_stage_is_a_part_of_its_bill():
    """41 K hours are for both stages; 1700 steps of the second, with mean answers from 4000 to 10 000 tokens."""
    short, long = (make_planning.rl_hours(1700, (mean, mean), 32768.0) for mean in (4000.0, 10000.0))
    assert 0.2 * 41e3 < short < long < 0.6 * 41e3


def test_memory_of_measured_steps_is_within_a_tenth():
    errors = [step.gib / step.raw["gib"][0] - 1 for step in make_planning.measured_steps()]
    assert len(errors) == 19
    assert max(map(abs, errors)) < 0.1
    assert sorted(map(abs, errors))[9] < 0.025, "half of them"


def test_times_of_measured_steps_are_too_short_by_one_factor():
    """Dense models, without the smallest products: Blackwell's share is that of later software."""
    ratios = []
    for step in make_planning.measured_steps():
        errors = [ours / ms for ours, ms in zip(step.milliseconds, step.raw["measured"], strict=True)]
        assert all(0.6 < ratio < 1 for ratio in errors), step.raw
        if step.layout.experts == 1 and step.layout.tensor < 8:
            ratios += errors
    middle = sorted(ratios)[len(ratios) // 2]
    assert all(ratio == pytest.approx(middle, rel=0.1) for ratio in ratios)


@pytest.mark.slow
def test_the_stages_of_r1_are_up_to_date():
    page = make_five_million.page(make_five_million.plan())
    assert page == make_five_million.PAGE.read_text(encoding="utf-8"), "run python docs/make_five_million.py"


def numbers(text):
    """55.1, 7.99e6 … of a text such as "55.1 days and $7.99 M"."""
    powers = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return [float(n.replace(",", "")) * powers[p] for n, p in re.findall(r"([\d,.]*\d)(?: ([KMGT])\b)?", text)]


@pytest.mark.parametrize("number", range(3))
def test_the_three_questions_of_the_readme_have_todays_answers(number, capsys, monkeypatch):
    rows = re.findall(r"^\|.*`rorqual (plan [^`]*)` \| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    command, answer = rows[number]
    monkeypatch.setattr(sys, "argv", ["rorqual", *command.split(), "--json"])
    with pytest.raises(SystemExit):
        entry.main()
    found = json.loads(capsys.readouterr().out)
    low, high = found["cost_usd_interval"]
    hours = [24 * x for x in (found["days"], *found["days_interval"])]
    right = [
        [found["days"], found["cost_usd"], low, high],
        [found["params"]["total"], found["tokens"], *hours, found["gpus"]],
        [found["gpus"], found.get("tokens_per_second_user"), found["cost_usd"], low, high],
    ][number]
    said = numbers(re.sub(r"\b[HA]\d00\b", "", answer))
    assert said == pytest.approx(right, rel=0.006), answer
