"""Tools for environments: Python functions that the model may call, and two ready-made ones.

A tool is a function with type hints and a docstring. Its parameters become the JSON schema that the model reads; those
named `problem`, `state` and `rng` are given by the environment instead and are not in the schema.
"""

import inspect
from collections.abc import Callable
from random import Random
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rorqual.data.chat_messages import Tool
from rorqual.data.tool_formats import as_object
from rorqual.errors import UserError
from rorqual.rl.envs.search import Index
from rorqual.rl.envs.user_functions import TimeLimit
from rorqual.sandbox.function_worker import FunctionError
from rorqual.sandbox.run_program import Limits, run_program
from rorqual.strict_json import Json

GIVEN = ("problem", "state", "rng")  # parameters that the environment fills in
SHOWN = 2000  # characters of a result that the model sees


class UserTool:
    """A function as a tool: its description, and calls with checked arguments."""

    def __init__(self, function: Callable[..., object], where: str, timeout: float) -> None:
        """where: begins errors; timeout: seconds of a call.

        Raises UserError for a parameter without a type hint, or of a type that JSON lacks.
        """
        self.function, self.name, self.timeout = function, function.__name__, timeout
        where = f"{where}: tool {self.name}"
        if not (text := inspect.getdoc(function)):
            raise UserError(f"{where} has no docstring, which tells the model what it does; add one")
        try:
            hints = get_type_hints(function)
        except Exception as e:  # hints are evaluated
            raise UserError(f"{where}: its type hints cannot be read ({e}); correct them") from None
        self.given: list[str] = []
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name in GIVEN:
                self.given.append(name)
                continue
            if name not in hints:
                raise UserError(f"{where}: parameter {name} has no type hint, which its JSON schema needs; add one")
            # An alias, since pydantic's models have attributes of their own, as `copy`.
            required = parameter.default is parameter.empty
            alias = Field(alias=name) if required else Field(alias=name, default=parameter.default)
            fields[f"argument_{len(fields)}"] = (hints[name], alias)
        self.names = [name for name in inspect.signature(function).parameters if name not in GIVEN]
        config = ConfigDict(extra="forbid")
        try:
            self._model: type[BaseModel] = create_model(self.name, __config__=config, **fields)
            schema = cast("dict[str, Json]", _untitled(self._model.model_json_schema()))
        except Exception as e:
            raise UserError(f"{where}: its parameters have no JSON schema ({e}); use str, int, float or lists") from e
        self.description: Tool = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": text,
                "parameters": schema,
            },
        }

    def __call__(self, arguments: str, given: dict[str, Any]) -> str:
        """The result of a call as text, or what is wrong with it. arguments: JSON, as the model wrote it."""
        values = as_object(arguments)
        if values is None:
            return "error: the arguments are not a JSON object"
        try:
            checked = self._model.model_validate(values)
        except ValidationError as e:
            first = e.errors()[0]
            return f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:SHOWN]
        read = [getattr(checked, field) for field in type(checked).model_fields]
        named = dict(zip(self.names, read, strict=True)) | {name: given[name] for name in self.given}
        try:
            with TimeLimit(self.timeout):
                result = str(self.function(**named))
        except FunctionError as e:
            result = f"error: {e}"
        except Exception as e:  # as a result, which the model can learn from
            result = f"error: {type(e).__name__}: {e}"
        return result[:SHOWN]


def _untitled(schema: Json) -> Json:
    """Without the titles that pydantic makes of names."""
    if isinstance(schema, dict):
        return {k: _untitled(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return [_untitled(value) for value in schema] if isinstance(schema, list) else schema


def python(code: str, rng: Random) -> str:
    """Run a Python program and return what it prints. Each call is a fresh program, without files and network."""
    # Its `random` is seeded, so that a resumed run sees the same.
    outcome = run_program(f"import random; random.seed({rng.getrandbits(32)})\n{code}", Limits())
    if outcome.status in ("timeout", "output"):
        limit = "it ran too long" if outcome.status == "timeout" else "it printed too much"
        return f"{outcome.detail}\nerror: {limit}"
    return outcome.detail.strip() or "(nothing was printed)"


def search(path: str, results: int = 3) -> Callable[[str], str]:
    """A tool that searches documents: files .txt and .md (a paragraph each is one) or .jsonl (with `text`).

    path: a file, or a folder of them. results: passages a search returns. Raises UserError where there are none.
    """
    index = Index(path)

    def search(query: str) -> str:
        """Search the documents and return the passages that fit the query best."""
        return "\n\n".join(index.best(query, results)) or "(nothing was found)"

    return search
