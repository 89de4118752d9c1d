import random

import pytest

from rorqual.rl.envs import countdown

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(
    "config",
    [
        {"min_numbers": 3, "max_numbers": 3, "max_value": 30, "min_target": 1, "max_target": 99},
        {},
        {"min_numbers": 2, "max_numbers": 5, "operators": ("+", "-", "/"), "shuffle": False, "min_target": 5},
    ],
)
def test_generates_what_reasoning_gym_generates(config):
    from reasoning_gym.games.countdown import QUESTION_FORMAT_TEMPLATE

    theirs = reasoning_gym.create_dataset("countdown", seed=11, size=60, **config)
    for i in range(60):
        ours = countdown.generate(theirs.config, theirs._prompt_templates, QUESTION_FORMAT_TEMPLATE, 11 + i)
        entry = theirs[i]
        assert ours["question"] == entry["question"]
        for name in ("numbers", "target"):
            assert ours["metadata"][name] == entry["metadata"][name]
        assert theirs.score_answer(ours["answer"], entry) == 1.0


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_scores_as_reasoning_gym_does():
    dataset = reasoning_gym.create_dataset("countdown", seed=3, size=400, min_numbers=3, max_numbers=4, max_value=12)
    rng = random.Random(0)
    seen = set()
    for i in range(250):
        entry = dataset[i]
        numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        answer = mutate(entry["answer"] if i % 2 else random_expression(rng, numbers), rng)
        expected = 0.01 if is_refused(answer) else dataset.score_answer(answer, entry)
        assert countdown.score(answer, numbers, target) == expected, (answer, entry["metadata"])
        seen.add(expected)
    assert seen == {0.01, 0.05, 1.0}


def is_refused(text):
    """Powers and floors are not asked for, and to sympy 9 / (1/0) is 0."""
    if "**" in text or "//" in text:
        return True
    try:
        eval(text)
    except ZeroDivisionError:
        return True
    except Exception:
        return False
    return False


def random_expression(rng, numbers):
    parts = list(map(str, numbers))
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        parts.append(f"({a}{rng.choice([' + ', '-', '*', ' / '])}{b})")
    return parts[0]


def mutate(text, rng):
    """Half of the answers stay; the rest lose, gain or change a character."""
    if rng.random() < 0.5:
        return text
    i = rng.randrange(len(text))
    return text[:i] + rng.choice(["", "(", ")", "1", "-", "+ ", "/0", " "]) + text[i + rng.randrange(2) :]


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), (" 8/ 4 ", 2), ("-3+5", 2), ("1/3*3", 1)],
)
def test_evaluates_exactly(text, value):
    assert countdown.evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    ["2**9", "9" * 13, "7//2", "__import__('os')", "1/0", "1;2", "1,2", "(1", "1" + "+1" * 150, "", "(2)(3)", "1.5"],
)
def test_refuses_everything_else(text):
    assert countdown.evaluate(text) is None


def test_a_value_close_to_the_target_is_not_rounded_up():
    assert countdown.score("100/3", [100, 3], 33) == 0.05
