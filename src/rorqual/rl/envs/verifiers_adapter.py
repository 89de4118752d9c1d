"""Environments of Prime Intellect's `verifiers` (0.1 and 0.2): `python = "verifiers:NAME"`.

The problems are the rows of its dataset, the replies its `env_response`, the reward its rubric's sum. What an
environment keeps in its state must survive pickling to be seen by the rubric, which runs in another process. Sampling,
tokens and time limits are Rorqual's.
"""

import asyncio
import pickle
from collections.abc import Coroutine
from importlib import import_module
from typing import Any

from rorqual.errors import UserError
from rorqual.extras import require


class Verifiers:
    """The installed environment `env`, loaded with `settings`."""

    def __init__(self, env: str, **settings: Any) -> None:
        """Raises UserError for an environment that cannot be loaded, has tools, or is of another version's kind."""
        require("envs", "verifiers")
        vf: Any = import_module("verifiers")

        if not hasattr(vf, "load_environment"):
            raise UserError(
                f"verifiers {vf.__version__} has no load_environment; run: pip install 'verifiers<0.3' and install the "
                "environment again"
            )
        self.env: Any = vf.load_environment(env, **settings)
        if isinstance(self.env, vf.ToolEnv):
            raise UserError(f"verifiers environment {env}: tools are not adapted; write them as functions")
        self.problems = [_problem(row) for row in self.env.get_dataset()]
        if isinstance(self.env, vf.MultiTurnEnv) and not isinstance(self.env, vf.SingleTurnEnv):
            self.reply = self._reply
            self.turns = max(2, self.env.max_turns) if self.env.max_turns > 0 else 8

    def reward(self, problem: dict[str, Any], messages: list[Any], state: dict[str, Any]) -> float:
        return _run(self._score(problem, messages, state))

    def _reply(self, problem: dict[str, Any], messages: list[Any], state: dict[str, Any]) -> str | None:
        return _run(self._respond(problem, messages, state))

    async def _respond(self, problem: dict[str, Any], messages: list[Any], state: dict[str, Any]) -> str | None:
        if "verifiers" not in state:
            state["verifiers"] = _State(await self._started(problem))
        of_env = state["verifiers"].value
        said = _normalised(messages)
        of_env["trajectory"].append(
            {"prompt": said[:-1], "completion": said[-1:], "response": None, "tokens": None, "reward": None,
             "advantage": None, "is_truncated": False, "trajectory_id": "", "extras": {}}
        )  # fmt: skip
        if await self.env.is_completed(of_env):
            return None
        found = await self.env.env_response(said, of_env)
        if of_env.get("final_env_response") is not None or await self.env.is_completed(of_env):
            return None
        return "\n".join(map(_text, [found] if isinstance(found, str) else found))

    async def _score(self, problem: dict[str, Any], messages: list[Any], state: dict[str, Any]) -> float:
        of_env = await self._started(problem)
        if "verifiers" in state:
            of_env.update(state["verifiers"].value)
        count = len(of_env["prompt"])
        said = _normalised(messages)
        of_env["completion"] = said[count:]
        await self.env.rubric.score_rollout(of_env)
        return float(of_env["reward"])

    async def _started(self, problem: dict[str, Any]) -> Any:
        types: Any = import_module("verifiers.types")
        row = {name: value for name, value in problem.items() if name not in ("question", "key", "difficulty")}
        of_env = await self.env.init_state(row, types.ClientConfig(api_base_url="http://127.0.0.1:9"), "rorqual")
        setup = getattr(self.env, "setup_state", None)
        return of_env if setup is None else (await setup(of_env) or of_env)


class _State:
    """An environment's state; pickled without what cannot be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in self.value.items():
            try:
                pickle.dumps(value)
            except Exception:  # of any type: objects define how they are pickled
                continue
            kept[name] = value
        return {"value": kept}


def _problem(row: Any) -> dict[str, Any]:
    fields = dict(row)
    return fields | {"question": [dict(message) for message in fields["prompt"]]}


def _normalised(messages: list[Any]) -> list[Any]:
    message_utils: Any = import_module("verifiers.utils.message_utils")
    normalise = getattr(message_utils, "normalize_messages", None)  # 0.1's early versions have dictionaries
    return messages if normalise is None else normalise(messages, field_name="messages")


def _text(message: Any) -> str:
    """Of a message: text, a dictionary or an object, by version."""
    if isinstance(message, str):
        return message
    read: Any = getattr(message, "content", None) or dict(message).get("content")
    return str(read or "")


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)
