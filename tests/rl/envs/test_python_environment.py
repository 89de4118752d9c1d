"""The contract of Python environments: every form of it, and every mistake with its sentence."""

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rorqual.data.tool_formats import HERMES, Call
from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection, RewardSection
from rorqual.rl.envs.environment import Episode, RewardError, Sample
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.envs.user_functions import TimeLimit
from rorqual.rl.rewards import score
from rorqual.sandbox.function_worker import FunctionError

FORMS = '''
import time
from random import Random

def doubled(rng):
    n = rng.randrange(1000)
    return {"question": f"Twice {n}?", "answer": 2 * n}

def listed():
    return [{"question": f"{n} and {n + 1}?", "answer": n} for n in range(50)]

class Talk:
    problems = [{"question": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "key": k}
                for k in "abcdefghij"]

    def reply(self, messages, state, rng):
        state["n"] = state.get("n", 0) + 1
        if messages[-1]["content"] == "break":
            raise KeyError("n")
        return None if state["n"] > 1 else f"You said {messages[-1]['content']}, I say {rng.randrange(10)}."

    def reward(self, state, text, truncated):
        if text == "raise":
            raise ValueError("no")
        if text == "loop":
            while True:
                pass
        return float("nan") if text == "nan" else -1.0 if truncated else len(text)

class Slow:
    turns = 4

    def __init__(self):
        self.tools = [self.look]

    def problem(self, rng):
        return {"question": "Where?", "answer": rng.random()}

    def look(self, place: str) -> str:
        """Look."""
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass

    def reply(self, text):
        while text == "loop":
            pass
        return None

class Guess:
    turns = 3

    def __init__(self, turns=(3, 7, 5)):
        self.played = [str(n) for n in turns]

    def problem(self, rng):
        return {"question": f"Guess, {rng.random()}", "answer": 5}

    def reply(self, text, state):
        if not text.isdecimal():
            raise ValueError(text)
        state["guesses"] = state.get("guesses", 0) + 1
        return None if text == "5" else "More." if int(text) < 5 else "Less."

    def worked(self):
        return self.played

    def reward(self, state):
        return float(state.get("guesses") == 3)

class Tools:
    turns = 3

    def __init__(self, unit="m"):
        self.unit = unit
        self.tools = [self.convert]

    def problem(self, rng):
        return {"question": "How far?", "answer": rng.random()}

    def convert(self, feet: float, state: dict, digits: int = 1) -> str:
        """Convert feet."""
        state["asked"] = feet
        if feet < 0:
            raise ValueError("negative")
        return f"{feet * 0.3048:.{digits}f} {self.unit}"

class Worked(Tools):
    def worked(self, rng, state, problem):  # by name, in an order of its own
        state["drawn"] = rng.randrange(100)
        return [("", "convert", {"feet": 10}), f"{problem['answer']} and {state['drawn']}"]

    def reward(self, state):
        return float(state == {"drawn": 17, "asked": 10.0})

class Twice(Tools):
    def worked(self):
        return ["a", "b"]

class Single:
    problems = [{"question": "?", "answer": n} for n in range(20)]

    def worked(self):
        return ["a", "b"]

class Broken(Single):
    def worked(self):
        yield "a"
        raise KeyError("b")

class Nothing2(Single):
    def worked(self):
        return None

class Taught(Tools):
    def worked(self, problem, teacher):
        return "?"

def levelled(level=1, rng=None):
    return {"question": f"Twice {rng.randrange(1000)}?", "answer": level}

def unknown(rng, colour):
    return {}

def empty(rng):
    return {"answer": 1}

def fails(rng):
    return 1 / 0

class Undescribed:
    tools = [print]
    problems = [{"question": "?"}]

class Unhinted(Tools):
    def __init__(self):
        def look(place):
            """Look."""
        self.tools = [look]

class Wrong(Talk):
    def reward(self, solution):
        return 1.0

class Nothing:
    pass
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "forms.py").write_text(FORMS)
    return tmp_path / "forms.py"


def opened(file, name, **fields):
    return open_environment(EnvironmentSection(name="mine", python=f"{file}:{name}", **fields))


def episode(problem, text):
    from random import Random

    return Episode(problem, [*problem.conversation, {"role": "assistant", "content": text}], Random(1), HERMES)


def test_a_function_of_a_generator(file):
    mine = opened(file, "doubled")
    first, again = mine.problems("train", 5, seed=1), opened(file, "doubled").problems("train", 5, seed=1)
    assert first == again
    assert mine.problems("train", 5, seed=2) != first
    problem = first[0]
    assert problem.answer == str(2 * int(problem.question.removeprefix("Twice ").removesuffix("?")))
    assert mine.correct(problem, f" {problem.answer}.0")  # by the judge
    assert not mine.correct(problem, "1")
    assert mine.turns == 1


def test_a_list(file):
    mine = opened(file, "listed")
    assert len(mine.all_problems()) == mine.candidate_count() == 50
    assert {p.split for p in mine.all_problems()} == {"train", "dev", "test"}


def test_messages_state_and_reply(file):
    mine = opened(file, "Talk")
    problem = mine.all_problems()[0]
    assert problem.question == "Be brief.\n\nHi"
    assert [m["role"] for m in problem.conversation] == ["system", "user"]
    said = episode(problem, "yes")
    (reply,) = mine.respond(said)
    assert reply == {"role": "user", "content": "You said yes, I say 2."}  # Random(1).randrange(10)
    assert said.state == {"n": 1}
    assert mine.respond(said) is None
    with pytest.raises(RewardError, match=r"environment mine: reply raised KeyError"):
        mine.respond(episode(problem, "break"))


def test_a_tool_is_described_called_and_its_errors_are_results(file):
    mine = opened(file, "Tools", config={"unit": "metres"})
    problem = mine.problems("train", 1)[0]
    (tool,) = problem.tools
    assert tool["function"] == {
        "name": "convert",
        "description": "Convert feet.",
        "parameters": {
            "type": "object",
            "properties": {"feet": {"type": "number"}, "digits": {"type": "integer", "default": 1}},
            "required": ["feet"],
            "additionalProperties": False,
        },
    }
    calls = ['{"feet": 10}', '{"feet": 10, "digits": 3}', '{"feet": -1}', '{"feet": "far"}', '{"metres": 1}']
    said = episode(problem, "Well.\n" + HERMES.write([Call("convert", c) for c in calls]))
    results = mine.respond(said)
    assert [r["role"] for r in results] == ["tool"] * 5
    contents = [r["content"] for r in results]
    assert contents[:3] == ["3.0 metres", "3.048 metres", "error: ValueError: negative"]
    assert contents[3].startswith("error: feet:")
    assert contents[4].startswith("error: ")
    assert said.state == {"asked": -1.0}
    (unknown,) = mine.respond(episode(problem, HERMES.write([Call("look", "{}")])))
    assert unknown["content"] == "error: there is no tool look; there are convert"
    assert mine.respond(episode(problem, "It is far.")) is None
    thought = "<think>" + HERMES.write([Call("convert", calls[0])]) + "</think>none"
    assert mine.respond(episode(problem, thought)) is None  # calls in the thinking are none


def test_worked_gets_what_its_parameters_ask_for_by_name(file):
    from random import Random

    mine = opened(file, "Worked")
    problem = mine.problems("train", 1)[0]
    sample = mine.worked(problem, Random(1))
    assert [m["content"] for m in sample.turns] == ["", "3.0 m", f"{problem.answer} and 17"]  # Random(1).randrange(100)
    assert sample.turns[0]["tool_calls"][0]["function"] == {"name": "convert", "arguments": '{"feet": 10}'}
    assert mine.grade(sample) == (1.0, True)
    assert mine.has_worked
    assert not opened(file, "Tools").has_worked


def test_worked_turns_are_replied_to_as_a_models_are(file):
    from random import Random

    mine = opened(file, "Guess")
    problem = mine.problems("train", 1)[0]
    sample = mine.worked(problem, Random(1))
    assert [(m["role"], m["content"]) for m in sample.turns] == [
        ("assistant", "3"), ("user", "More."), ("assistant", "7"), ("user", "Less."), ("assistant", "5"),
    ]  # fmt: skip
    assert sample.state == {"guesses": 3}
    assert mine.grade(sample) == (1.0, True)


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("Guess", [3, 5, 4], "the turn '5' ends the episode, but 1 follow; leave out what follows"),
        ("Guess", [3, 4], "reply answers the last turn, '4'; let it end the episode there"),
        ("Guess", [3, "four", 5], "reply raised ValueError: four, after the turn 'four' of worked"),
        ("Guess", [1, 2, 3, 5], "it has 4 turns, and the environment 3; write fewer, or raise that"),
        ("Guess", [], "the last turn must be a text"),
        ("Single", None, "it has 2 turns, and the environment 1; write one text, or a reply"),
        ("Broken", None, "worked raised KeyError"),
        ("Nothing2", None, "worked raised TypeError"),
        ("Twice", None, "the turn 'a' ends the episode, but 1 follow; call a tool in it, or write a reply"),
    ],
)
def test_worked_turns_that_cannot_be_played(file, name, turns, message):
    from random import Random

    mine = opened(file, name, config={"turns": turns} if turns is not None else {})
    with pytest.raises(UserError, match=re.escape(message)):
        mine.worked(mine.problems("train", 1)[0], Random(1))


def test_a_tool_and_a_reply_that_hang_are_stopped(file):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        _check_limits(file, signal.getsignal(signal.SIGALRM))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_bare_except_is_interrupted_again():
    caught = []

    def stubborn():
        while True:
            try:
                while True:
                    pass
            except BaseException:
                caught.append(1)
                if len(caught) == 2:
                    raise

    with pytest.raises(FunctionError, match=r"longer than 0\.1 seconds"), TimeLimit(0.1):
        stubborn()


def test_a_signal_after_the_end_is_ignored():
    limit = TimeLimit(1000)
    with limit:
        pass
    limit._late()
    with pytest.raises(FunctionError), limit:
        limit._late()


def test_other_threads_have_no_limit():
    def slow():
        with TimeLimit(0.01):
            time.sleep(0.05)
        return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(slow).result() == "done"


def _check_limits(file, handler):
    mine = opened(file, "Slow", timeout=0.2)
    problem = mine.problems("train", 1)[0]
    (result,) = mine.respond(episode(problem, HERMES.write([Call("look", '{"place": "here"}')])))
    assert result["content"] == "error: it took longer than 0.2 seconds"
    with pytest.raises(RewardError, match=r"environment mine: reply: it took longer than 0\.2 seconds"):
        mine.respond(episode(problem, "loop"))
    assert mine.respond(episode(problem, "done")) is None
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is handler


def test_problem_gets_its_generator_by_name(file):
    assert {p.answer for p in opened(file, "levelled").problems("train", 3)} == {"1"}


def test_rewards_that_raise_hang_or_are_nan_are_named_and_skipped(file):
    mine = opened(file, "Talk", timeout=1.0)
    problem = mine.all_problems()[0]
    texts = ["four", "raise", "loop", "nan", "a", "six..."]
    samples = [Sample(problem, text, len(text), text == "a") for text in texts]
    samples.append(Sample(problem, "x", 1, False, error="environment mine: reply raised KeyError: 'n'"))
    samples.append(Sample(problem, "ok", 2, False))
    found = score(samples, {"mine": mine}, RewardSection(format=0.0), 100)
    assert found.skipped.tolist() == [False, True, True, True, False, False, True, False]
    assert found.parts["accuracy"].tolist() == [4, 0, 0, 0, -1, 6, 0, 2]
    assert found.correct.tolist() == [True, False, False, False, False, True, False, True]
    assert sorted(found.notes) == [
        "1 of 8 samples skipped: environment mine: reply raised KeyError: 'n'",
        "1 of 8 samples skipped: environment mine: reward: it raised ValueError: no",
        "1 of 8 samples skipped: environment mine: reward: it returned nan, not a finite number",
        "1 of 8 samples skipped: environment mine: reward: it took longer than 1 seconds",
    ]
    # The mean of a group is that of the others, (4 + 0·3)/1 and (−1 + 6 + 2)/3.
    assert found.grouped(4).tolist() == [[4, 4, 4, 4], pytest.approx([-1, 6, 7 / 3, 2])]
    assert found.mean(found.total) == pytest.approx(11 / 4)


def test_reward_functions_of_a_recipe(file):
    mine = opened(file, "doubled")
    problem = mine.problems("train", 1)[0]
    rewards = file.with_name("rewards.py")
    rewards.write_text("def long(text, problem, answer):\n    return len(text) / (0 if answer is None else 2)\n")
    section = RewardSection(format=0.0, functions={"long": {"python": f"{rewards}:long", "weight": 0.5}})
    right = f"<answer>{problem.answer}</answer>"
    samples = [Sample(problem, right, 9, False), Sample(problem, "I do not know", 9, True)]
    found = score(samples, {"mine": mine}, section, 100)
    assert found.parts["long"].tolist() == [len(right) / 2, 0]
    assert found.total.tolist() == [1 + 0.5 * len(right) / 2, 0]
    assert found.notes == [
        "1 of 2 samples skipped: reward.functions.long: it raised ZeroDivisionError: division by zero"
    ]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Nothing", {}, "has neither problem nor problems"),
        ("unknown", {}, "problem: parameter colour is unknown; use any of rng"),
        ("Wrong", {}, "reward: parameter solution is unknown; use any of problem, answer, text"),
        ("Taught", {}, "worked: parameter teacher is unknown; use any of problem, state, rng"),
        ("Undescribed", {}, "tool print.*(docstring|type hint)"),
        ("Unhinted", {}, "tool look: parameter place has no type hint"),
        ("doubled", {"config": {"a": 1}}, "is a function, which has no config"),
        ("doubled", {"turns": 3}, "neither reply nor tools"),
        ("Tools", {"config": {"units": "m"}}, r"python = .* cannot be loaded \(TypeError: .*units"),
        ("Missing", {}, r"cannot be loaded \(it has no Missing, only doubled, listed, Talk"),
    ],
)
def test_mistakes(file, name, fields, message):
    with pytest.raises(UserError, match=f"environment mine.*{message}"):
        opened(file, name, **fields)


@pytest.mark.parametrize(
    ("name", "message"), [("empty", "not a dict with a question"), ("fails", r"problem raised ZeroDivisionError")]
)
def test_problems_that_are_none(file, name, message):
    with pytest.raises(UserError, match=f"environment mine: .*{message}"):
        opened(file, name).problems("train", 1)


def test_two_sources_are_one_too_many():
    with pytest.raises(ValueError, match="path and python are two sources"):
        EnvironmentSection(name="mine", path="a.jsonl", python="a.py:A")
