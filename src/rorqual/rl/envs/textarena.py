"""Games of TextArena for one player, as a Python environment: `python = "rorqual.rl.envs.textarena:Game"`."""

import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from rorqual.errors import UserError
from rorqual.extras import require

_lock = threading.Lock()  # of the random generator that all games share


class Game:
    """A game by its name there; the model's turns are its moves, and what the game says to them the replies."""

    turns = 50

    def __init__(self, game: str, **settings: Any) -> None:
        """settings: of the game. Raises UserError for an unknown game, and for one of several players."""
        require("envs", "textarena")
        self.game, self.settings = game, settings
        try:
            _Play(self, 0)
        except Exception as e:  # of any type: games check their settings and players themselves
            raise UserError(f"textarena's game {game!r} cannot be played by one player ({e}); choose another") from e

    def problem(self, rng: random.Random) -> dict[str, Any]:
        seed = rng.randrange(1 << 30)
        return {"question": _Play(self, seed).said(), "key": f"{self.game} {seed}", "seed": seed}

    def reply(self, problem: dict[str, Any], text: str, state: dict[str, Any]) -> str | None:
        if "play" not in state:
            state["play"] = _Play(self, problem["seed"])
            state["play"].said()  # the question
        play: _Play = state["play"]
        if play.step(text.rpartition("</think>")[2].strip()):
            state["reward"] = play.reward()
            return None
        return play.said()

    def reward(self, state: dict[str, Any]) -> float:
        """The game's; 0 of one that was not played to its end."""
        return state.get("reward", 0.0)


class _Play:
    """One play. Games draw from Python's shared generator: here each play has its own state of it."""

    def __init__(self, game: Game, seed: int) -> None:
        textarena: Any = import_module("textarena")
        self._state: Any = random.Random(seed).getstate()
        with self._own_random():
            self._env: Any = textarena.make(f"{game.game}-raw", **game.settings)
            self._env.reset(num_players=1, seed=seed)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()  # the process of the reward needs its result alone

    def step(self, move: str) -> bool:
        """Whether the game is over."""
        with self._own_random():
            return bool(self._env.step(action=move)[0])

    def said(self) -> str:
        """What the game has said since the last call, without the player's own moves."""
        with self._own_random():
            found = self._env.get_observation()[1]
        return "\n".join(text for of, text, _ in found if of != 0) or "(nothing)"

    def reward(self) -> float:
        with self._own_random():
            rewards: Any = self._env.close()[0]
        return float(rewards[0]) if rewards else 0.0

    @contextmanager
    def _own_random(self) -> Generator[None]:
        with _lock:
            shared = random.getstate()
            random.setstate(self._state)
            try:
                yield
            finally:
                self._state = random.getstate()
                random.setstate(shared)
