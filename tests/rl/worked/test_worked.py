"""Every worked solution is right, and so is every line of it that is not the slip which a check finds."""

import re
from random import Random

import pytest

from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rewards import format_reward
from rorqual.rl.worked import WRITERS, write
from rorqual.rl.worked.arithmetic import _linear
from rorqual.rl.worked.style import DIFFERS

CONFIGS = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 3},
    "knights_knaves": {"n_people": 2},
    "leg_counting": {"min_animals": 2, "max_animals": 4},
}
EQUATION = re.compile(r"(?<![\w.])(-?\d+(?: [-+*/] -?\d+)+) = (-?\d+)(?![\w*/]| [-+*/])")


def solutions(family, count):
    environment = open_environment(EnvironmentSection(name=family, config=CONFIGS.get(family, {})))
    for i, problem in enumerate(environment.problems("train", count, seed=3)):
        worked = write(problem, Random(i))
        if worked is not None:
            yield environment, problem, worked


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_every_solution_is_correct_in_the_format_and_the_same_again(family):
    count = 8 if family == "programs" else 60
    found = list(solutions(family, count))
    assert len(found) >= 0.85 * count
    for i, (environment, problem, worked) in enumerate(found):
        answer = environment.read(problem, worked.completion)
        assert environment.correct(problem, answer), (problem.question, worked)
        assert format_reward(worked.completion) == 1.0
        assert i or write(problem, Random(0)) == worked


@pytest.mark.parametrize("family", ["chain_sum", "simple_equations", "leg_counting"])
def test_every_calculation_is_right_but_for_slips_that_are_found(family):
    slipped = 0
    for _, _, worked in solutions(family, 120):
        lines = worked.thinking.splitlines()
        wrong = [line for line in lines for a, b in EQUATION.findall(line) if eval(a) != int(b)]
        found = any(line in DIFFERS for line in lines)
        slipped += found
        if not found:
            assert not wrong, worked.thinking
        else:
            assert not [line for line in lines[lines.index(next(d for d in lines if d in DIFFERS)) :] if line in wrong]
    assert (slipped == 0) == (family == "leg_counting")
    assert slipped < 60  # about a fifth


def test_cases_of_knights_are_judged_as_the_puzzle_does():
    for _, problem, worked in solutions("knights_knaves", 40):
        *_, last = [line for line in worked.thinking.splitlines() if line.startswith("Suppose ")]
        roles = ["a_knight" if knight else "a_knave" for knight in problem.metadata["solution"]]
        terms = problem.metadata["knight_knave_terms"]
        names = problem.metadata["names"]
        assert last == "Suppose " + " and ".join(f"{n} is {terms[r]}" for n, r in zip(names, roles, strict=True)) + "."
        assert "contradiction" not in worked.thinking.partition(last)[2]


@pytest.mark.parametrize(
    ("text", "found"),
    [("4*h + 2*h - 3", (6, -3)), ("-x + 7", (-1, 7)), ("12 - 3*y", (-3, 12)), ("2*x*y", None), ("x**2", None)],
)
def test_linear_sides(text, found):
    assert _linear(text) == found
