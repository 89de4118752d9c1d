"""Games of textarena and environments of verifiers, where these packages are installed (extra `envs`)."""

import pickle
import sys
from random import Random

import pytest

from rorqual.errors import UserError
from rorqual.rl.envs.textarena import Game
from rorqual.rl.envs.verifiers_adapter import Verifiers


def test_a_game_is_played_to_its_end():
    pytest.importorskip("textarena")
    game, state = Game("GuessTheNumber-v0"), {}
    problem = game.problem(Random(0))
    assert problem == game.problem(Random(0)) != game.problem(Random(1))
    said = [game.reply(problem, "I say [21].", state), *(game.reply(problem, f"[{n}]", state) for n in (1, 20))]
    assert "outside the range" in said[0]
    assert said[1:] == ["The target number is higher.", "The target number is lower."]
    for n in range(2, 20):
        if game.reply(problem, f"[{n}]", state) is None:
            break
    sent = pickle.loads(pickle.dumps(state))  # to the process of the reward
    assert 0 < game.reward(sent) <= 1


def test_games_of_two_are_refused():
    pytest.importorskip("textarena")
    with pytest.raises(UserError, match="'TicTacToe-v0' cannot be played by one player"):
        Game("TicTacToe-v0")


MODULE = """
import verifiers as vf
from datasets import Dataset

class Again(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["count"] = 0
        return state

    async def env_response(self, messages, state, **kwargs):
        state["count"] += 1
        return [{"role": "user", "content": f"again {state['count']}"}]

    @vf.stop
    async def said_stop(self, state, **kwargs):
        return bool(state["trajectory"]) and "stop" in str(state["trajectory"][-1]["completion"])

def load_environment(several=False):
    data = Dataset.from_list([{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(5)])
    def right(completion, answer, **kwargs):
        return float(answer in str(completion[-1].content))
    def counted(state, **kwargs):
        return float(state.get("count", 0))
    rubric = vf.Rubric(funcs=[right, counted], weights=[1.0, 0.5])
    if several:
        return Again(dataset=data, rubric=rubric, max_turns=4)
    return vf.SingleTurnEnv(dataset=data, rubric=rubric, system_prompt="Be brief.")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    vf = pytest.importorskip("verifiers")
    if not hasattr(vf, "load_environment"):
        pytest.skip("verifiers 0.3 and later have no load_environment")
    (tmp_path / "again_env.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_a_single_turn(installed):
    environment = Verifiers("again_env")
    problem = environment.problems[1]
    assert problem["question"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    for text, reward in (("it is 2", 1.0), ("3", 0.0)):
        said = [*problem["question"], {"role": "assistant", "content": text}]
        assert environment.reward(problem, said, {}) == reward


def test_several_turns(installed):
    environment, state = Verifiers("again_env", several=True), {}
    problem = environment.problems[1]
    said = [*problem["question"], {"role": "assistant", "content": "hello"}]
    assert environment.reply(problem, said, state) == "again 1"
    said += [{"role": "user", "content": "again 1"}, {"role": "assistant", "content": "2, stop"}]
    assert environment.reply(problem, said, state) is None
    assert environment.reward(problem, said, pickle.loads(pickle.dumps(state))) == 1.5
    assert environment.turns == 4
