"""A user's functions: loaded with errors of one sentence, called with what their parameters ask for by name."""

import functools
import inspect
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rorqual.errors import UserError
from rorqual.rl.envs.environment import Environment, RewardError, Sample
from rorqual.sandbox import function_worker
from rorqual.sandbox.function_worker import FunctionError, FunctionWorker

OF_REWARD = ("problem", "answer", "text", "messages", "state", "truncated")


def loaded(spec: str, where: str, config: Mapping[str, Any] | None = None) -> Any:
    """The class's object, or the function, that `spec` names.

    where: begins the UserError that is raised where it cannot be loaded.
    """
    try:
        return function_worker.build(spec, config or {})
    except Exception as e:  # of any type: it is the user's code
        reason = str(e) if isinstance(e, LookupError | FileNotFoundError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{where} = {spec!r} cannot be loaded ({reason}); correct it") from e


def parameters(function: Callable[..., object], known: Iterable[str], where: str) -> list[str]:
    """The names of a function's parameters. Raises UserError for one that is not `known` and has no default."""
    known = tuple(known)
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in known:
            names.append(name)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise UserError(f"{where}: parameter {name} is unknown; use any of {', '.join(known)}")
    return names


class _Late(BaseException):
    """Not an Exception, which the user's code may catch."""


class TimeLimit:
    """Raises FunctionError where the user's code in it takes longer. Code in C is stopped once it is back in Python.

    For functions that share objects with this process, as an episode's state; `UserReward` has its own process. Only
    the main thread can be interrupted: in others there is no limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running = False  # a signal that comes when the user's code has ended is ignored
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGALRM, self._late)
            self._running = True
            # Each second again: a bare `except` catches the first.
            signal.setitimer(signal.ITIMER_REAL, self.seconds, 1.0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._running = False
        if self._before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
        if isinstance(error, _Late):
            raise FunctionError(f"it took longer than {self.seconds:g} seconds") from None

    def _late(self, *_: object) -> None:
        if self._running:
            raise _Late


class UserReward:
    """A user's reward, called in another process with a time limit."""

    def __init__(
        self, spec: str, where: str, timeout: float, config: Mapping[str, Any] | None = None, method: str = ""
    ) -> None:
        """where: what it is called in messages. Raises UserError where there is no such function."""
        found = loaded(spec, where, config)
        function = getattr(found, method) if method else found
        if not callable(function):
            raise UserError(f"{where} = {spec!r} is a {type(function).__name__}, not a function; name a function")
        self.where, self.names = where, parameters(function, OF_REWARD, where)
        self.worker = FunctionWorker(spec, timeout, config, method)

    def __call__(self, sample: Sample, environment: Environment) -> float:
        """Raises RewardError where it gives no number in time."""
        values = {
            "problem": sample.problem.fields,
            "answer": None if sample.truncated else environment.read(sample.problem, sample.text),
            "text": sample.text,
            "messages": sample.messages,
            "state": sample.state,
            "truncated": sample.truncated,
        }
        try:
            return self.worker({name: values[name] for name in self.names})
        except FunctionError as e:
            raise RewardError(f"{self.where}: {e}") from None


@functools.cache
def reward_function(spec: str, where: str, timeout: float) -> UserReward:
    """The function of a recipe's [reward.functions]; its process is kept."""
    return UserReward(spec, where, timeout)
