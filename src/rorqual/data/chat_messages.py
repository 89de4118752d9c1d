"""Conversations as clients and datasets write them, brought into the one form that `ChatTemplate` renders."""

import json
from typing import Any

from rorqual.data.tool_formats import as_json, too_deep
from rorqual.errors import UserError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's before there were tools
    "ipython": "tool",  # Llama 3's
}
# Of a content's parts, the field with the text.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHTS = {"thinking": "thinking", "reasoning": "reasoning"}  # an assistant's alone
# Read here or by a server, and not for the template.
OWN = {"role", "content", "tool_calls", "function_call", "tool_call_id", "refusal", "prefix"}


def read_messages(value: Any, where: str) -> list[Message]:
    """Messages with role, content (text or None), tool_calls and tool_call_id where there are any, and whatever else
    they have for the template.

    A null counts as absent. Calls are {"id", "type": "function", "function": {"name", "arguments": text}}; every call
    and every result has an id. Raises UserError, which begins with `where` and the place, for what is no conversation.
    """
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: must be a non-empty list; mend it")
    messages = [_message(message, f"{where}.{n}") for n, message in enumerate(value)]
    _identify(messages)
    return messages


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools as {"type": "function", "function": {"name", …}}, from a list of them, of functions, or a text of JSON.

    None where there are none. Raises UserError, which begins with `where` and the place, for what is no function.
    """
    value = _parsed(value, where)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: must be a list, not {_shown(value)}; mend it")
    return [_tool(tool, f"{where}.{n}") for n, tool in enumerate(value)] or None


def without_nulls(value: Any) -> Any:
    """What Parquet says, which gives every object of a column all the fields that any has, null where it has none."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        if value and all(isinstance(v, tuple) for v in value):  # a map
            return {key: without_nulls(v) for key, v in value}
        return [without_nulls(v) for v in value]
    return value


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object with role and content, not {_shown(value)}; mend it")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}.role: must be one of {', '.join(ROLES)}, not {_shown(role)}; mend it")
    content, thoughts = _text(value.get("content"), f"{where}.content", role == "assistant")
    if content is None and isinstance(value.get("refusal"), str):
        content = value["refusal"]
    message: Message = {key: v for key, v in value.items() if key not in OWN and v is not None}
    message |= {"role": ROLES[role], "content": content}
    if thoughts:
        message.setdefault("reasoning_content", thoughts)
    calls = _parsed(value.get("tool_calls"), f"{where}.tool_calls")
    if not calls and value.get("function_call"):
        calls = [{"function": value["function_call"]}]
    if calls:
        if not isinstance(calls, list | tuple) or role != "assistant":
            raise UserError(f"{where}.tool_calls: must be a list, in a message of role assistant; mend it")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls.{n}") for n, call in enumerate(calls)]
    if value.get("tool_call_id"):
        message["tool_call_id"] = str(value["tool_call_id"])
    return message


def _text(content: Any, where: str, assistant: bool = False) -> tuple[str | None, str]:
    """A content's text and an assistant's thoughts: as they are, or of its parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list | tuple):
        raise UserError(f"{where}: must be text or a list of parts, not {_shown(content)}; mend it")
    said = thought = ""
    for n, part in enumerate(content):
        if assistant and isinstance(part, dict) and str(part.get("type")) in THOUGHTS:
            thought += _part(part, f"{where}.{n}", THOUGHTS)
        else:
            said += _part(part, f"{where}.{n}", TEXTS)
    return said, thought


def _part(part: Any, where: str, fields: dict[str, str]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else part
    name = fields.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise UserError(f"{where}.type: only text can be read, not {_shown(kind)}; leave the part out")
    text = part.get(name)
    if isinstance(text, list) and fields is THOUGHTS:  # Mistral's, of parts themselves
        return _text(text, f"{where}.{name}")[0] or ""
    if not isinstance(text, str):
        raise UserError(f"{where}.{name}: must be text, not {_shown(text)}; mend it")
    return text


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call, in OpenAI's form or, as some datasets have it, a function's name and arguments alone."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: must have a function with a name and arguments, not {_shown(value)}; mend it")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, str):
        try:
            arguments = as_json(arguments)
        except (TypeError, ValueError, RecursionError) as e:
            raise UserError(f"{where}.function.arguments: cannot be written as JSON ({e}); mend them") from None
    return {"id": value.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _identify(messages: list[Message]) -> None:
    """Give ids to calls and results that have none, by their order, and results the name of their function."""
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


def _tool(value: Any, where: str) -> dict[str, Any]:
    value = _parsed(value, where)
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: must be a function with a name, not {_shown(value)}; mend it")
    # `strict` is said to whoever serves a model, not to the model.
    function = {key: v for key, v in function.items() if v is not None and key not in ("type", "strict")}
    if "parameters" in function:
        function["parameters"] = _parsed(function["parameters"], f"{where}.function.parameters")
        if not isinstance(function["parameters"], dict):
            raise UserError(f"{where}.function.parameters: must be a JSON schema; mend them")
    if too_deep(function):
        raise UserError(f"{where}: is nested too deeply; make it flatter")
    return {"type": "function", "function": function}


def _parsed(value: Any, where: str) -> Any:
    """Where datasets write JSON as a text, what it says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is text, but not JSON ({e}); mend it") from None


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return type(value).__name__ if isinstance(value, dict | list) and too_deep(value) else f"{value!r:.80}"
