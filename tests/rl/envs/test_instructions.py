import pytest

from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.environment import Problem
from rorqual.rl.envs.instructions import KINDS
from rorqual.rl.envs.registry import open_environment

ENVIRONMENT = open_environment(EnvironmentSection(name="instructions"))


@pytest.mark.parametrize(
    ("kind", "value", "kept", "broken"),
    [
        ("sentences", 2, "It rains. It pours!", "It rains. It pours! Always."),
        ("sentences", 2, "<<Title. Here>>\nOne. Two.", "One."),
        ("bullets", 2, "* one\n* two", "* one\n*two"),
        ("no_commas", None, "one and two", "one, two"),
        ("lower", None, "all small.", "Not small."),
        ("ending", "The end.", "So it was. The end.", "The end. So it was."),
        ("word", "old", "An Old tree.", "A bold tree."),
        ("title", None, "<<Rain>>\nIt rains.", "It rains <<Rain>>"),
        ("words", 30, "word " * 30, "word " * 31),
    ],
)
def test_rules(kind, value, kept, broken):
    assert KINDS[kind].kept(kept, value)
    assert not KINDS[kind].kept(broken, value)
    problem = Problem("q", "", "k", "", "instructions", metadata={"rules": [(kind, value), ("no_commas", None)]})
    other = float("," not in broken)
    assert ENVIRONMENT.score(problem, broken) == other / 2
    assert not ENVIRONMENT.correct(problem, broken)


def test_rules_of_a_problem_can_be_kept_together():
    for problem in ENVIRONMENT.problems("train", 200, seed=1):
        names = [name for name, _ in problem.metadata["rules"]]
        assert len(set(names)) == len(names) in (2, 3)
        assert not any(a in KINDS[b].excludes for a in names for b in names)
        assert all(KINDS[name].says(value) in problem.question for name, value in problem.metadata["rules"])
