"""The speedrun's corpus: what it says is true, and nothing of it is in the test."""

import json
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.judge.extract_answer import read_answer
from rorqual.rl.envs.environment import Problem, number_key
from rorqual.rl.envs.registry import open_environment
from rorqual.speedrun.documents import (
    RIGHT,
    STEP,
    VERTEX,
    WRONG,
    attempts,
    documents,
    expression,
    line_is_right,
    write_documents,
)
from rorqual.speedrun.level import LEVELS


def is_right(environment, document):
    return environment.correct(document.problem, read_answer(document.completion, document.problem.answer))


@pytest.fixture(scope="module", params=LEVELS, ids=lambda level: level.name)
def environments(request):
    return {section.name: open_environment(section) for section in request.param.environments}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_attempts_and_their_expressions_are_what_they_say(count):
    rng = Random(0)
    for _ in range(40):
        numbers = sorted(rng.randint(1, 25) for _ in range(count))
        every = attempts(tuple(numbers))
        assert len(every) >= 3 * (count - 1)
        for steps, value in every.items():
            written = expression(steps)
            assert eval(written) == value
            assert sorted(map(int, re.findall(r"\d+", written))) == numbers
            for a, op, b, result in STEP.findall(steps):
                assert eval(f"{a}{op}{b}") == int(result)


def test_countdown_documents_mark_truly_and_do_not_repeat_themselves(environments):
    environment = environments["countdown"]
    right = given_up = 0
    for document in documents(environment.problems("train", 300, 1), 900, 0):
        lines = document.thinking.splitlines()
        assert len(set(lines)) == len(lines)
        for line in lines:
            steps, mark = line.rsplit(" ", 1)
            assert mark in (RIGHT, WRONG)
            assert line_is_right(document.problem, steps) == (mark == RIGHT)
        solved = lines[-1].endswith(RIGHT)
        assert (
            environment.correct(document.problem, read_answer(document.completion, document.problem.answer)) == solved
        )
        right, given_up = right + solved, given_up + (not solved)
    assert right > given_up > 50, "both kinds are there, or reinforcement learning has nothing to choose from"


def test_chain_documents_end_right_and_find_their_slips(environments):
    environment = environments["chain_sum"]
    kinds = {"at once": 0, "steps": 0, "checked": 0, "corrected": 0}
    for document in documents(environment.problems("train", 300, 1), 900, 0):
        assert is_right(environment, document)
        text = document.thinking
        kind = "corrected" if WRONG in text else "checked" if RIGHT in text else "steps" if text else "at once"
        kinds[kind] += 1
        wrong = [line for line in text.splitlines() if line_is_right(document.problem, line.rstrip(" ✓✗")) is False]
        assert len(wrong) == (kind == "corrected"), "one slip, and only where a check finds it"
    assert min(kinds.values()) > 40, kinds


def test_graph_documents_mark_truly_and_answer_as_they_mark():
    environment = open_environment(next(s for s in LEVELS[-1].environments if s.name == "graph_color"))
    kinds = {"at once": 0, "first try": 0, "again": 0, "given up": 0}
    for document in documents(environment.problems("train", 300, 1), 900, 0):
        lines = document.thinking.splitlines()
        for line in lines:
            steps, mark = line.rsplit(" ", 1)
            assert line_is_right(document.problem, steps) is (mark == RIGHT)
        given_up = bool(lines) and lines[-1].endswith(WRONG)
        assert (
            environment.correct(document.problem, read_answer(document.completion, document.problem.answer)) != given_up
        )
        kinds["given up" if given_up else ("at once", "first try", "again", "again")[len(lines)]] += 1
    assert min(kinds.values()) > 30, kinds


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("0=1,1(0=1)=2,2(0=1,1=2)=3,3(1=2)=2", False),  # two neighbors alike
        ("0=1,1(0=1)=2,2(0=1,1=2)=3,3(1=2)=1", True),
        ("0=1,1=2,2=3,3=1", True),
        ("0=1,1(0=2)=3,2(0=1,1=3)=2,3(1=3)=1", False),  # a color that 0 does not have
        ("0=1,1(0=1)=2,2(0=1,1=2)=3,3(1=2)=4", False),  # no such color
        ("0=1,1(0=1)=2,2(0=1,1=2)=3", False),  # a vertex left over
        ("0=1,1(0=1)=2,2(0=1,1=2)=3,3(1=2)", False),  # one without a color
        ("0=1,0=2,1(0=2)=3,2(0=2,1=3)=1,3(1=3)=1", False),  # a vertex twice
        ("0=1,1(0=1=2", None),
        ("hm", None),
    ],
)
def test_colorings_are_judged(line, right):
    puzzle = {"vertices": [0, 1, 2, 3], "edges": [(0, 1), (0, 2), (1, 2), (1, 3)], "color_options": [1, 2, 3]}
    problem = Problem("", "", "", "", "graph_color", metadata={"puzzle": puzzle})
    assert line_is_right(problem, line) is right


@given(
    st.sampled_from(["countdown", "chain_sum", "graph_color"]),
    st.text("0123456789=(),+-*✓ ") | st.from_regex(STEP) | st.from_regex(VERTEX) | st.just("9" * 5000 + "+1=2"),
)
def test_whatever_a_model_writes_is_judged(family, line):
    puzzle = {"vertices": [0, 1], "edges": [(0, 1)], "color_options": [1, 2, 3]}
    problem = Problem("", "3", "", "", family, metadata={"numbers": [1, 2], "target": 3, "puzzle": puzzle})
    assert line_is_right(problem, line) in (True, False, None)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("3*8=24,24-1=23", True),
        ("8*3=24,24-1=23", True),
        ("3*8=24,24-1=22", False),  # a false step
        ("3*8=24,24-2=22", False),  # a number that is not there
        ("3*8=24", False),  # one left over
        ("8-1=7,7*3=21", False),  # true, but not the target
        ("hm", None),
    ],
)
def test_lines_are_judged(environments, line, right):
    problem = environments["countdown"].problems("train", 1, 0)[0]
    problem.metadata.update(numbers=[1, 3, 8], target=23)
    assert line_is_right(problem, line) is right


def test_nothing_of_the_test_is_in_the_corpus(environments, tmp_path):
    chosen = list(environments.values())
    path = tmp_path / "documents.jsonl"
    counts = [3000, 1500, 1500][: len(chosen)]
    assert write_documents(path, chosen, counts, [count // 2 for count in counts], 3) == sum(counts)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == sum(counts)
    seen: dict[str, set[str]] = {"make": set(), "calculate": set(), "color": set()}
    for text in texts:
        question = text.partition("\n")[0]
        verb, *rest = question.split()
        numbers = rest[2:] if verb == "make" else rest
        seen[verb].add(
            question if verb == "color" else number_key(int(n) for n in re.findall(r"\d+", " ".join(numbers)))
        )
    for environment, verb in zip(chosen, seen, strict=False):
        held_out = {p.question if verb == "color" else p.key for p in environment.problems("test", 1000, 0)}
        assert len(held_out) > 100
        assert not held_out & seen[verb]
