"""Functions that a model may call: told to it by its chat template, read from what it says."""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Grammar
from rorqual.engine.grammar import json_grammar
from rorqual.serve.protocol import ChatRequest, Tool, ToolChoice

HERMES, DEEPSEEK = "<tool_call>", "<｜tool▁calls▁begin｜>"
# V3 and R1 write `function<sep>NAME` and the arguments in a fence; V3.1 writes `NAME<sep>ARGUMENTS`.
DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]+?)\s*(?:\n```json\n|<｜tool▁sep｜>)"
    r"(?P<arguments>.*?)(?:\n```)?\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)
HERMES_CALL = re.compile(r"<tool_call>\s*(?P<call>\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass
class Call:
    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def marker_of(template: str) -> str:
    """What begins a call in the words of a model with this chat template."""
    return DEEPSEEK if DEEPSEEK in template else HERMES


def told(messages: list[dict[str, Any]], tools: list[Tool], template: str) -> list[dict[str, Any]]:
    """The messages for a template that knows nothing of tools: described in the system's message, in Hermes' way."""
    if "tools" in template:
        return messages
    described = "\n".join(json.dumps(t.function.model_dump(exclude_none=True), ensure_ascii=False) for t in tools)
    text = (
        f"You can call these functions:\n{described}\nTo call one, answer with\n"
        '<tool_call>{"name": "its name", "arguments": {its arguments}}</tool_call>\nand nothing after it.'
    )
    changed = []
    for message in messages:
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
        elif calls := message.get("tool_calls"):
            said = "".join(f"<tool_call>{json.dumps(c['function'], ensure_ascii=False)}</tool_call>" for c in calls)
            message = {"role": "assistant", "content": (message["content"] or "") + said}
        changed.append(message)
    if changed[0]["role"] == "system":
        return [changed[0] | {"content": f"{changed[0]['content']}\n\n{text}"}, *changed[1:]]
    return [{"role": "system", "content": text}, *changed]


def forced(request: ChatRequest) -> Grammar | None:
    """The grammar of a call, where one must be made: one JSON object with name and arguments."""
    choice = request.tool_choice
    if not request.tools or not (choice == "required" or isinstance(choice, ToolChoice)):
        return None
    allowed = [
        t.function
        for t in request.tools
        if not isinstance(choice, ToolChoice) or t.function.name == choice.function.name
    ]
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": f.name}, "arguments": f.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in allowed
    ]
    return json_grammar(schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


class CallReader:
    """Takes an answer's text as it comes and gives what is to be shown, and the calls.

    forced: all of it is one call. several: there may be more than one.
    """

    def __init__(self, marker: str, forced: bool, several: bool = True) -> None:
        self._marker, self._forced, self._several = marker, forced, several
        self._held = ""

    def feed(self, piece: str, last: bool) -> tuple[str, list[Call]]:
        self._held += piece
        if self._forced:
            if not last:
                return "", []
            call = _from_json(self._held)
            return ("", [call]) if call else (self._held, [])
        at = self._held.find(self._marker)
        if at < 0:
            at = len(self._held) - (0 if last else self._beginning())
        shown, self._held = self._held[:at], self._held[at:]
        if not last or not self._held:
            return shown, []
        calls = self._calls()[: None if self._several else 1]
        return (shown, calls) if calls else (shown + self._held, [])

    def _calls(self) -> list[Call]:
        if self._marker == DEEPSEEK:
            found = [Call(m["name"], m["arguments"]) for m in DEEPSEEK_CALL.finditer(self._held)]
            return [call for call in found if _is_object(call.arguments)]
        read = [_from_json(m["call"]) for m in HERMES_CALL.finditer(self._held)]
        return [call for call in read if call]

    def _beginning(self) -> int:
        """Characters at the end that may be the beginning of a marker."""
        longest = min(len(self._marker) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._marker.startswith(self._held[-n:])), 0)


def _from_json(text: str) -> Call | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return Call(call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
