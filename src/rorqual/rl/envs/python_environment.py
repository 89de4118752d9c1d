"""Environments in Python: a user's class or function, in a file or an installed package (docs/environments.md).

    def problem(self, rng) -> dict     one problem from a random.Random: `question`, and mostly `answer`
    problems                           or all of them: a list, or a function that returns one
    def reward(self, …) -> float       by default 1 where the judge finds the answer equal to the problem's
    def reply(self, …) -> str | None   what is said to the model after its turn; None, or no such method, ends it
    tools                              a list of functions that the model may call
    turns                              of the model at most, where there is a reply or a tool
    def worked(self, …)                the model's turns as you would write them, for a cold start: texts, or
                                       (text, tool, arguments) where it calls a tool

A function is `problem`, or `problems` where it takes no argument. Methods get what their parameters ask for by name.
"""

import inspect
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, cast

from rorqual import strict_json
from rorqual.data.call_reader import CallReader
from rorqual.data.chat_messages import CalledFunction, Message, ToolCall, read_messages
from rorqual.errors import UserError
from rorqual.judge import judge
from rorqual.rl.envs.environment import (
    Environment,
    Episode,
    Problem,
    RewardError,
    Sample,
    Shuffled,
    integers,
    number_key,
    text_key,
)
from rorqual.rl.envs.tools import UserTool
from rorqual.rl.envs.user_functions import TimeLimit, UserReward, loaded, parameters
from rorqual.rl_sections import EnvironmentSection
from rorqual.sandbox.function_worker import FunctionError

OF_REPLY = ("problem", "text", "messages", "state", "rng")
OF_WORKED = ("problem", "state", "rng")
TURNS = 8  # where neither recipe nor environment say


class PythonEnvironment(Environment):
    """The environment `section.python`, made with `section.config`.

    Raises UserError where it cannot be loaded, and for functions whose parameters are unknown.
    """

    remedy = "let it have more"

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)
        assert section.python is not None
        self.where, spec = f"environment {section.name}", section.python
        user = loaded(spec, f"{self.where}: python", section.config)
        is_function = inspect.isroutine(user)
        if is_function and section.config:
            raise UserError(f"{self.where}: {spec} is a function, which has no config; remove it, or write a class")
        tools = [UserTool(tool, self.where, section.timeout) for tool in getattr(user, "tools", [])]
        self.tools = {tool.name: tool for tool in tools}
        source = user if is_function else getattr(user, "problem", None) or getattr(user, "problems", None)
        if source is None:
            raise UserError(f"{self.where}: {spec} has neither problem nor problems; add one")
        self._listed: Shuffled | None = None
        if callable(source) and parameters(source, ("rng",), f"{self.where}: problem"):
            self._source: Callable[..., object] = source
        else:
            rows = self._called("problems", source) if callable(source) else source
            found = [self._problem(row, f"{spec}, problem {i}") for i, row in enumerate(rows, 1)]
            if not found:
                raise UserError(f"{self.where}: problems is empty; let it have some")
            self._listed = Shuffled(found)
        self._reward = None
        if not is_function and hasattr(user, "reward"):
            self._reward = UserReward(spec, f"{self.where}: reward", section.timeout, section.config, "reward")
        self._timeout = section.timeout
        self._reply = None if is_function else getattr(user, "reply", None)
        if self._reply is not None:
            self._reply_names = parameters(self._reply, OF_REPLY, f"{self.where}: reply")
        self._worked = None if is_function else getattr(user, "worked", None)
        if self._worked is not None:
            self._worked_names = parameters(self._worked, OF_WORKED, f"{self.where}: worked")
        if self.tools or self._reply is not None:
            self.turns = section.turns or getattr(user, "turns", TURNS)
            if not isinstance(self.turns, int) or self.turns < 2:
                raise UserError(f"{self.where}: turns = {self.turns!r}, but reply and tools need at least 2; raise it")
        elif section.turns:
            raise UserError(f"{self.where}: turns = {section.turns}, but it has neither reply nor tools; leave it out")
        self.turn_tokens = section.turn_tokens

    @property
    def has_worked(self) -> bool:
        """Whether the user writes solutions for a cold start."""
        return self._worked is not None

    def candidate_count(self) -> int | None:
        return None if self._listed is None else len(self._listed.problems)

    def all_problems(self) -> list[Problem] | None:
        return None if self._listed is None else list(self._listed.problems)

    def candidate(self, seed: int, index: int) -> Problem | None:
        if self._listed is not None:
            return self._listed.candidate(seed, index)
        row = self._called("problem", partial(self._source, rng=Random(f"{seed}/{index}")))
        return None if row is None else self._problem(row, f"{self.where}: a problem")

    def check(self, problem: Problem, answer: str) -> float:
        """Without a `reward`: 1 where the judge finds the answer equal to the problem's."""
        return float(judge.same_answer(problem.answer, answer))

    def grade(self, sample: Sample) -> tuple[float, bool]:
        """(what `reward` returns, whether that is 1 or more and the sample ended by itself)."""
        if self._reward is None:
            return super().grade(sample)
        value = self._reward(sample, self)
        return value, value >= 1.0 and not sample.truncated

    def respond(self, episode: Episode) -> list[Message] | None:
        """The results of the calls in the model's turn; where it has none, the reply, if there is one."""
        after = episode.text.rpartition("</think>")[2]
        _, calls = CallReader(episode.calls, set(self.tools)).feed(after, last=True) if self.tools else ("", [])
        given = {"problem": episode.problem.fields, "state": episode.state, "rng": episode.rng}
        if calls:
            results: list[Message] = []
            for call in calls:
                tool = self.tools.get(call.name)
                unknown = f"error: there is no tool {call.name[:100]}; there are {', '.join(self.tools)}"
                content = unknown if tool is None else tool(call.arguments, given)
                results.append({"role": "tool", "content": content, "name": call.name})
            return results
        return self._replied(episode.text, episode.messages, given)

    def _replied(self, text: str, messages: list[Message], given: dict[str, Any]) -> list[Message] | None:
        """What `reply` says to the model's turn; None where the episode ends. Raises RewardError."""
        if self._reply is None:
            return None
        values = given | {"text": text, "messages": [dict(m) for m in messages]}
        try:
            with TimeLimit(self._timeout):
                said = self._reply(**{name: values[name] for name in self._reply_names})
        except FunctionError as e:
            raise RewardError(f"{self.where}: reply: {e}") from None
        except Exception as e:  # of any type: it is the user's code
            raise RewardError(f"{self.where}: reply raised {type(e).__name__}: {e}"[:300]) from e
        if said is not None and not isinstance(said, str):
            raise RewardError(f"{self.where}: reply returned {said!r:.60}, neither text nor None")
        return None if said is None else [{"role": "user", "content": said}]

    def worked(self, problem: Problem, rng: Random) -> Sample | None:
        """The episode that the user's `worked` plays; None without one. Raises UserError for what it gets wrong."""
        if self._worked is None:
            return None
        where, messages, state = f"{self.where}: worked", list[Message](), dict[str, Any]()
        given = {"problem": problem.fields, "state": state, "rng": rng}
        worked = partial(self._worked, **{name: given[name] for name in self._worked_names})
        # A list in any case: a generator's code runs when it is read.
        turns: list[Any] = self._called("worked", lambda: [x] if isinstance(x := worked(), str) else list(x))
        if not turns or not isinstance(turns[-1], str):
            raise UserError(f"{where}: the last turn must be a text, the model's answer")
        if len(turns) > self.turns:
            remedy = "write fewer, or raise that" if self.turns > 1 else "write one text, or a reply"
            raise UserError(f"{where}: it has {len(turns)} turns, and the environment {self.turns}; {remedy}")
        for left, turn in zip(reversed(range(len(turns))), turns, strict=True):
            if isinstance(turn, str):
                messages.append({"role": "assistant", "content": turn})
                try:
                    said = self._replied(turn, [*problem.conversation, *messages], given) or []
                except RewardError as e:
                    raise UserError(f"{e}, after the turn {turn!r:.60} of worked; correct one of them") from None
                if left and not said:
                    remedy = "leave out what follows" if self._reply else "call a tool in it, or write a reply"
                    raise UserError(f"{where}: the turn {turn!r:.60} ends the episode, but {left} follow; {remedy}")
                if said and not left:
                    raise UserError(f"{where}: reply answers the last turn, {turn!r:.60}; let it end the episode there")
                messages += said
                continue
            text, name, arguments = turn
            if name not in self.tools:
                raise UserError(f"{where}: there is no tool {name!r}; there are {', '.join(self.tools) or 'none'}")
            identity = f"call{len(messages):05}"
            function: CalledFunction = {"name": name, "arguments": strict_json.dumps(arguments)}
            call: ToolCall = {"id": identity, "type": "function", "function": function}
            messages.append({"role": "assistant", "content": text, "tool_calls": [call]})
            result = self.tools[name](function["arguments"], given)
            messages.append({"role": "tool", "content": result, "name": name, "tool_call_id": identity})
        return Sample(problem, messages[-1]["content"] or "", 0, False, messages, state)

    def _called(self, name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except UserError:
            raise
        except Exception as e:  # of any type: it is the user's code
            raise UserError(f"{self.where}: {name} raised {type(e).__name__} ({e}); correct it") from e

    def _problem(self, row: object, where: str) -> Problem:
        fields = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
        question: object = fields.get("question")
        if not question:
            raise UserError(f"{where} is {row!r:.60}, not a dict with a question; correct it")
        if isinstance(question, str):
            messages, text = None, question
        else:
            messages = read_messages(question, f"{where}: question")
            text = "\n\n".join(message["content"] or "" for message in messages)
        answer = "" if fields.get("answer") is None else str(fields["answer"])
        # With the answer: environments that hide something ask the same question each time.
        whole = f"{text} {answer}"
        key = fields.get("key") or (number_key(integers(whole)) if integers(text) else text_key(whole))
        return Problem(
            question=text,
            answer=answer,
            key=str(key),
            difficulty=str(fields.get("difficulty", "")),
            family=self.family,
            where=where,
            metadata=dict(fields),
            messages=messages,
            tools=[tool.description for tool in self.tools.values()] or None,
        )
