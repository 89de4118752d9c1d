"""Tool-call formats: how calls are written, described to the model and parsed, for training and serving.

Writing and describing are for chat templates that do not support tools.
Sources: the chat templates of released models (Qwen and Hermes; DeepSeek V3, R1 and V3.1; Mistral; Llama 3).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rorqual.strict_json import Json
from rorqual.unicode_checks import whole, whole_inside

DEEPEST = 100  # levels of nesting
NAME, ARGUMENTS = "\x00name\x00", "\x00arguments\x00"  # placeholders in a Format's `call`


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON; in a history, unchecked text of the model


@dataclass(frozen=True)
class Format:
    """The syntax of calls in an answer.

    opens: the strings that a call begins with. head, tail: what precedes and follows a call's JSON, which is the
    arguments where `head` has a group `name`, else an object with name and arguments, or a list of them. end: the
    string that ends one call; None: the call ends with the answer. close: what may follow the last call. call, around,
    between: templates to write calls. result: delimiters of a function's result, where a template has no role for it.
    """

    opens: tuple[str, ...]
    head: re.Pattern[str]
    tail: re.Pattern[str]
    call: str
    end: str | None = None
    close: str = ""
    around: tuple[str, str] = ("", "")
    between: str = "\n"
    result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")

    @property
    def bare(self) -> bool:
        """Calls have no opening string of their own: an answer begins with a call or has none."""
        return "{" in self.opens

    def halves(self, name: str) -> tuple[str, str]:
        """What is written before and after a call's arguments."""
        before, after = self.call.split(ARGUMENTS)
        return before.replace(NAME, as_json(name)[1:-1]), after

    def write(self, calls: list[Call]) -> str:
        """Calls in this format."""
        written = [call.arguments.join(self.halves(call.name)) for call in calls]
        return self.between.join(written).join(self.around)

    def describe_tools(self, tools: Iterable[Mapping[str, object]]) -> str:
        """A system prompt that describes the functions, for chat templates that do not."""
        described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = "{its arguments}".join(self.halves("its name")).join(self.around)
        return f"You can call these functions:\n{described}\nTo call one, answer with\n{example}\nand nothing after it."

    def read(self, text: str, names: set[str] | None = None, last: bool = True) -> tuple[list[Call], int] | None:
        """The calls at the start of `text` and their end index; None where it does not start with a call.

        names: of the available functions; a `bare` format accepts only calls of these. last: no more text follows, so
        that the end of a call may be missing.
        """
        head = self.head.match(text)
        if head is None:
            return None
        try:
            value, at = DECODER.raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return None
        tail = self.tail.match(text, at)
        assert tail is not None  # every part of it is optional
        rest = text[tail.end() :]
        if self.end is not None and self.end not in tail[0]:
            if not last:
                return None
            if rest.strip() and self.end.startswith(rest.strip()):  # the end string itself is cut off
                rest = ""
        name = head.groupdict().get("name")
        found = [_call(v, name) for v in (value if isinstance(value, list) else [value])]
        calls = [call for call in found if call is not None and not (self.bare and names and call.name not in names)]
        return (calls, len(text) - len(rest)) if calls and len(calls) == len(found) else None


HERMES = Format(
    opens=("<tool_call>",),
    head=re.compile(r"<tool_call>\s*"),
    tail=re.compile(r"\s*(?:</tool_call>)?"),
    end="</tool_call>",
    call=f'<tool_call>\n{{"name": "{NAME}", "arguments": {ARGUMENTS}}}\n</tool_call>',
)
DEEPSEEK = Format(  # V3 and R1
    opens=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    # V3 and R1 write `function<sep>NAME` and the arguments in a fence; V3.1 writes `NAME<sep>ARGUMENTS`.
    head=re.compile(
        r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
        r"(?P<name>[^\n<]+?)\s*(?:\n```json\s|<｜tool▁sep｜>)\s*"
    ),
    tail=re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>)?"),
    end="<｜tool▁call▁end｜>",
    close="<｜tool▁calls▁end｜>",
    call=f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>",
    around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    result=("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
DEEPSEEK_V31 = replace(
    DEEPSEEK, call=f"<｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>", between=""
)
MISTRAL = Format(
    opens=("[TOOL_CALLS]",),
    head=re.compile(r"\[TOOL_CALLS\]\s*(?:(?P<name>[\w.-]+)\s*(?:\[CALL_ID\][\w-]+)?\s*(?:\[ARGS\])?\s*)?"),
    tail=re.compile(""),
    call=f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}',
    around=("[TOOL_CALLS][", "]"),
    between=", ",
    result=("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
JSON = Format(  # only an object; what a grammar generates for a required call
    opens=("<|python_tag|>", "{"),
    head=re.compile(r"\s*(?:<\|python_tag\|>)?\s*(?=\{)"),
    tail=re.compile(r"(?:\s*;(?=\s*\{))?"),
    call=f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}',
)
LLAMA = replace(JSON, call=f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}')

FORMATS = (DEEPSEEK, DEEPSEEK_V31, HERMES, MISTRAL, LLAMA, JSON)  # the last two also match inside others


def format_of(text: str, name: str) -> Format | None:
    """The format of a call of `name` in a text; None where there is no such call."""

    def squeezed(some: str) -> str:
        return "".join(some.split())

    found: list[Format] = []
    for form in FORMATS:
        starts = [at for mark in form.opens if (at := text.find(mark)) >= 0]
        read = form.read(text[min(starts) :]) if starts else None
        if read is not None and read[0][0].name == name:
            found.append(form)
    written = [form for form in found if squeezed(form.halves(name)[0]) in squeezed(text)]
    return next(iter(written or found), None)


def as_json(value: object) -> str:
    """JSON text that UTF-8 can encode: lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if whole(text) else json.dumps(value)


def as_object(text: str) -> dict[str, Json] | None:
    """A call's arguments as an object; None where they are not a JSON object, as a model may generate."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or too_deep(value):
        return None
    return value if whole_inside(value) else None


def too_deep(value: dict[str, Any] | list[Any]) -> bool:
    """Whether lists and objects are nested deeper than DEEPEST, which recursive code could not follow."""
    level = [value]
    for _ in range(DEEPEST):
        inside = (v for some in level for v in (some.values() if isinstance(some, dict) else some))
        level = [v for v in inside if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a JSON number")
    return value


# Not strict: models put line breaks into strings.
DECODER = json.JSONDecoder(strict=False, parse_float=_number, parse_constant=_number)


def _call(value: Json, name: str | None) -> Call | None:
    """A call from its JSON; only the arguments where `name` is given, and possibly as a JSON text."""
    arguments = value
    if name is None:
        if not isinstance(value, dict) or not isinstance(found := value.get("name"), str):
            return None
        name = found
        arguments = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str) and arguments.strip():
        arguments = as_object(arguments)
    elif arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict) or too_deep(arguments) or not name or not whole(name):
        return None
    return Call(name, as_json(arguments))
