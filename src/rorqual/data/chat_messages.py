"""Normalise the conversations of clients and datasets to the form that `ChatTemplate` renders."""

import json
from typing import Any, Literal, NotRequired, Required, TypedDict, cast, overload

from rorqual.data.tool_formats import as_json, too_deep
from rorqual.errors import UserError
from rorqual.strict_json import Json


class CalledFunction(TypedDict):
    name: str
    arguments: str  # JSON


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(TypedDict, total=False):
    """A message of `read_messages`. Other fields are allowed; they are for the template."""

    role: Required[str]  # system, user, assistant or tool
    content: Required[str | None]
    reasoning_content: str  # an assistant's thinking; some datasets name it reasoning or thinking
    tool_calls: list[ToolCall]
    tool_call_id: str  # of the call whose result this is
    name: str  # of the function whose result this is
    weight: float  # 0: an assistant's message that is not trained on


class FunctionDescription(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Json]]  # a JSON schema


class Tool(TypedDict):
    """A tool of `read_tools`."""

    type: Literal["function"]
    function: FunctionDescription


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's before tools
    "ipython": "tool",  # Llama 3's
}
# Type of a content part → its field with the text.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THINKING = {"thinking": "thinking", "reasoning": "reasoning"}  # in assistant messages only
# Read here or by a server, and not passed to the template.
OWN = {"role", "content", "tool_calls", "function_call", "tool_call_id", "refusal", "prefix"}


def read_messages(value: object, where: str) -> list[Message]:
    """Messages with role, content (text or None), tool_calls and tool_call_id where present, and the other fields for
    the template.

    A null counts as absent. Calls are {"id", "type": "function", "function": {"name", "arguments": text}}; every call
    and every result has an id. Raises UserError, which begins with `where` and the field, for anything else.
    """
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: must be a non-empty list; correct it")
    messages = [_message(message, f"{where}.{n}") for n, message in enumerate(value)]
    _identify(messages)
    return messages


def read_tools(value: object, where: str) -> list[Tool] | None:
    """Tools as {"type": "function", "function": {"name", …}}, from a list of tools or functions, or its JSON text.

    None where there are none. Raises UserError, which begins with `where` and the field, for anything else.
    """
    value = _parsed(value, where)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: must be a list, not {_shown(value)}; correct it")
    return [_tool(tool, f"{where}.{n}") for n, tool in enumerate(value)] or None


@overload
def without_nulls(value: dict[str, object]) -> dict[str, object]: ...
@overload
def without_nulls(value: object) -> object: ...
def without_nulls(value: object) -> object:
    """A Parquet value without its nulls: Parquet gives each object of a column the fields of all, null where absent."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        if value and all(isinstance(v, tuple) for v in value):  # a map
            return {key: without_nulls(v) for key, v in value}
        return [without_nulls(v) for v in value]
    return value


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object with role and content, not {_shown(value)}; correct it")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}.role: must be one of {', '.join(ROLES)}, not {_shown(role)}; correct it")
    content, thinking = _text(value.get("content"), f"{where}.content", role == "assistant")
    if content is None and isinstance(value.get("refusal"), str):
        content = value["refusal"]
    others = {key: v for key, v in value.items() if key not in OWN and v is not None}
    message = cast(Message, others | {"role": ROLES[role], "content": content})
    if thinking:
        message.setdefault("reasoning_content", thinking)
    calls = _parsed(value.get("tool_calls"), f"{where}.tool_calls")
    if not calls and value.get("function_call"):
        calls = [{"function": value["function_call"]}]
    if calls:
        if not isinstance(calls, list | tuple) or role != "assistant":
            raise UserError(f"{where}.tool_calls: must be a list, in a message of role assistant; correct it")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls.{n}") for n, call in enumerate(calls)]
    if value.get("tool_call_id"):
        message["tool_call_id"] = str(value["tool_call_id"])
    return message


def _text(content: object, where: str, assistant: bool = False) -> tuple[str | None, str]:
    """(text, thinking) of a content: a text, or a list of parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list | tuple):
        raise UserError(f"{where}: must be text or a list of parts, not {_shown(content)}; correct it")
    text = thinking = ""
    for n, part in enumerate(content):
        if assistant and isinstance(part, dict) and str(part.get("type")) in THINKING:
            thinking += _part(part, f"{where}.{n}", THINKING)
        else:
            text += _part(part, f"{where}.{n}", TEXTS)
    return text, thinking


def _part(part: object, where: str, fields: dict[str, str]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else part
    name = fields.get(kind) if isinstance(kind, str) else None
    if not isinstance(part, dict) or name is None:
        raise UserError(f"{where}.type: only text is supported, not {_shown(kind)}; remove the part")
    text = part.get(name)
    if isinstance(text, list) and fields is THINKING:  # Mistral: a list of parts
        return _text(text, f"{where}.{name}")[0] or ""
    if not isinstance(text, str):
        raise UserError(f"{where}.{name}: must be text, not {_shown(text)}; correct it")
    return text


def _call(value: object, where: str) -> ToolCall:
    """A call, in OpenAI's form or, as in some datasets, only a function's name and arguments."""
    function = _function(value)
    if not isinstance(value, dict) or function is None:
        raise UserError(f"{where}: must have a function with a name and arguments, not {_shown(value)}; correct it")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, str):
        try:
            arguments = as_json(arguments)
        except (TypeError, ValueError, RecursionError) as e:
            raise UserError(f"{where}.function.arguments: cannot be written as JSON ({e}); correct them") from None
    called: CalledFunction = {"name": function["name"], "arguments": arguments}
    return {"id": value.get("id") or "", "type": "function", "function": called}


def _function(value: object) -> dict[str, Any] | None:
    """The function of a call or a tool, which is also accepted without the object around it; None without a name."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _identify(messages: list[Message]) -> None:
    """Add missing ids to calls and results, in their order, and to results the name of their function."""
    names: dict[str, str] = {}
    unanswered: list[str] = []
    for message in messages:
        for call in message.get("tool_calls", []):
            call["id"] = str(call["id"] or f"call{len(names):05}")  # nine letters and digits, as Mistral's must be
            names[call["id"]] = call["function"]["name"]
            unanswered.append(call["id"])
        if message["role"] == "tool":
            identity = message.setdefault("tool_call_id", unanswered[0] if unanswered else f"call{len(names):05}")
            if identity in unanswered:
                unanswered.remove(identity)
            if identity in names:
                message.setdefault("name", names[identity])


def _tool(value: object, where: str) -> Tool:
    value = _parsed(value, where)
    function = _function(value)
    if function is None:
        raise UserError(f"{where}: must be a function with a name, not {_shown(value)}; correct it")
    # `strict` is for the server, not for the model.
    function = {key: v for key, v in function.items() if v is not None and key not in ("type", "strict")}
    if "parameters" in function:
        function["parameters"] = _parsed(function["parameters"], f"{where}.function.parameters")
        if not isinstance(function["parameters"], dict):
            raise UserError(f"{where}.function.parameters: must be a JSON schema; correct them")
    if too_deep(function):
        raise UserError(f"{where}: is nested too deeply; make it flatter")
    return {"type": "function", "function": cast(FunctionDescription, function)}


def _parsed(value: object, where: str) -> object:
    """The value of a JSON text, as some datasets write it; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is text, but not JSON ({e}); correct it") from None


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return type(value).__name__ if isinstance(value, dict | list) and too_deep(value) else f"{value!r:.80}"
