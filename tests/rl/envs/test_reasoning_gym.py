import time

import pytest
import reasoning_gym

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.reasoning_gym import is_safe_expression, is_safe_literal
from rorqual.rl.envs.registry import open_environment


def environment(name, **fields):
    return open_environment(EnvironmentSection(name=name, **fields))


@pytest.mark.parametrize(
    "name",
    [
        "basic_arithmetic",
        "gsm_symbolic",
        "word_ladder",
        "knights_knaves",
        "letter_counting",
        "acre",
        "string_insertion",
    ],
)
def test_a_dataset_gives_problems_and_accepts_its_own_answers(name):
    source = environment(name)
    for problem in source.problems("test", 3, seed=1):
        assert problem.split == "test"
        assert source.correct(problem, problem.answer)
        assert source.score(problem, None) == source.score(problem, " ") == 0.0


def test_a_dataset_told_apart_by_words_is_split_by_its_text():
    splits = {split: environment("knights_knaves").problems(split, 10) for split in ("train", "dev", "test")}
    assert all(" " in p.key and not p.key[0].isdigit() for problems in splits.values() for p in problems)


@pytest.mark.parametrize("spelling", ["{}", "{}.0", "+{}", "**{}**", r"\boxed{{{}}}", "${}$", "{}.", "0{}"])
def test_a_number_is_right_however_it_is_written(spelling):
    source = open_environment(EnvironmentSection(name="basic_arithmetic", config={"min_digits": 1, "max_digits": 1}))
    problem = next(p for p in source.problems("train", 20) if p.answer.isdigit())
    assert source.correct(problem, spelling.format(problem.answer))
    assert not source.correct(problem, spelling.format(int(problem.answer) + 1))


def test_signs_of_operators_in_countdown():
    source = open_environment(EnvironmentSection(name="countdown"))
    problem = source.problems("train", 1)[0]
    assert source.correct(problem, problem.answer.replace("*", "×").replace("-", "−").replace("/", "÷"))
    assert source.correct(problem, rf"$ {problem.answer.replace('*', chr(92) + 'times ')} $")


def test_partial_credit_is_not_correct():
    source = environment("countdown")
    problem = source.problems("dev", 1)[0]
    wrong = "+".join(map(str, problem.metadata["numbers"]))
    assert source.score(problem, wrong) == 0.05
    assert not source.correct(problem, wrong)


def test_a_checker_that_evaluates_runs_elsewhere_and_can_be_stopped(tmp_path):
    source = environment("polynomial_multiplication")
    problem = source.problems("dev", 1)[0]
    assert source.score(problem, problem.answer.replace("**", "**")) == 1.0
    trap = tmp_path / "trap"
    assert source.score(problem, f"__import__('pathlib').Path('{trap}').touch()") == 0.0
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "config"),
    [("chain_sum", {"max_digits": 10**30}), ("tower_of_hanoi", {"min_disks": 40, "max_disks": 40})],
)
def test_a_config_that_takes_for_ever_is_refused(monkeypatch, name, config):
    """For lack of memory, or of time, when the process that tries is killed."""
    with monkeypatch.context() as patch:
        patch.setattr("rorqual.rl.envs.reasoning_gym.MAKE_TIMEOUT", 2.0)
        with pytest.raises(UserError, match=rf"environment {name}: .* more than 2 seconds, or too much memory; lower"):
            environment(name, config=config)
    assert environment("chain_sum", config={"max_terms": 90}).problems("dev", 1)  # large, and tried


def test_difficulty_is_a_label_of_what_varies():
    problems = environment("chain_sum", config={"min_terms": 2, "max_terms": 3}).problems("train", 30)
    assert {p.difficulty.split(",")[0] for p in problems} == {"num_terms=2", "num_terms=3"}
    assert environment("countdown").problems("dev", 1)[0].difficulty.startswith("numbers=")


def test_generation_runs_ahead():
    source = environment("chain_sum")
    source.chunked(0, 0)
    deadline = time.monotonic() + 10
    while not source._chunks[0, 1].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source._chunks[0, 1].done()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("countdwn", {}, "'countdwn' is not a dataset of reasoning-gym"),
        ("composite", {}, "is not a dataset"),
        ("countdown", {"config": {"numbers": 3}}, "its fields are max_numbers"),
        ("countdown", {"config": {"min_numbers": 9}}, "refused"),
        ("countdown", {"config": {"seed": 9}}, "config.seed follows from the run's seed"),
    ],
)
def test_bad_sections(name, fields, message):
    with pytest.raises(UserError, match=message):
        environment(name, **fields)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("3*x**2 + sin(x) + C", True),
        ("exp(x)/2.5", True),
        ("__import__('os')", False),
        ("x.__class__", False),
        ("a.b", False),
        ("open(x)", False),
        ("9" * 20, False),
        ("lambda: 1", False),
    ],
)
def test_safe_expression(text, safe):
    assert is_safe_expression(text) is safe


@pytest.mark.parametrize(
    ("text", "safe"),
    [("['A', 'B']", True), ("[[0, 1], [1, 0]]", True), ("_ Q _", True), ("exit()", False), ("__builtins__", False)],
)
def test_safe_literal(text, safe):
    assert is_safe_literal(text) is safe


def test_a_candidate_that_fails_is_passed_over(monkeypatch):
    source = environment("chain_sum", prompt="{expression}")
    whole = [source.candidate(0, index).question for index in range(6)]
    broken, dataset = environment("chain_sum", prompt="{expression}"), type(reasoning_gym.create_dataset("chain_sum"))
    real = dataset.__getitem__

    def sometimes(self, index):
        if index == 2:
            raise KeyError("a fault in the dataset")
        found = real(self, index)
        if index == 4:
            found = found | {"metadata": {k: v for k, v in found["metadata"].items() if k != "expression"}}
        return found

    monkeypatch.setattr(dataset, "__getitem__", sometimes)
    found = [broken.candidate(0, index) for index in range(6)]
    assert [problem and problem.question for problem in found] == [*whole[:2], None, whole[3], None, whole[5]]
