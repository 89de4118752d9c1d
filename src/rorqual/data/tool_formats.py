"""How models write calls of functions: one description per format, for training as for serving.

A `Format` says how calls are written where a chat template does not, how a model is told of it, and how they are read.
Sources: the chat templates of released models (Qwen and Hermes; DeepSeek V3, R1 and V3.1; Mistral; Llama 3).
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from rorqual.unicode_checks import whole, whole_inside

DEEPEST = 100  # levels
NAME, ARGUMENTS = "\x00name\x00", "\x00arguments\x00"  # in a Format's `call`


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON; in a history whatever the model wrote


@dataclass(frozen=True)
class Format:
    """How calls stand in an answer.

    opens: the marks that a call begins with. head, tail: what stands before a call's JSON and behind it; the JSON is
    the arguments where `head` has a group `name`, else an object with name and arguments, or a list of them. end: the
    mark that ends one call; None: it is whole when the answer is. close: what may follow the last one. call, around,
    between: how calls are written. result: what a function's result stands between, where a template has no such role.
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
        """Calls have no mark of their own: an answer begins with one, or there is none."""
        return "{" in self.opens

    def halves(self, name: str) -> tuple[str, str]:
        """What is written before a call's arguments, and behind them."""
        before, after = self.call.split(ARGUMENTS)
        return before.replace(NAME, as_json(name)[1:-1]), after

    def write(self, calls: list[Call]) -> str:
        """Calls as a model writes them."""
        written = [call.arguments.join(self.halves(call.name)) for call in calls]
        return self.between.join(written).join(self.around)

    def tell(self, tools: list[dict[str, Any]]) -> str:
        """What a model is told of functions by a server whose chat template tells nothing."""
        described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = "{its arguments}".join(self.halves("its name")).join(self.around)
        return f"You can call these functions:\n{described}\nTo call one, answer with\n{example}\nand nothing after it."

    def read(self, text: str, names: set[str] | None = None, last: bool = True) -> tuple[list[Call], int] | None:
        """The calls that `text` begins with, and where they end; None where it begins with none.

        names: of the functions there are; without a mark of their own only calls of these are calls.
        last: no more text will come, so that the end of a call may be missing.
        """
        head = self.head.match(text)
        if head is None:
            return None
        try:
            value, at = DECODER.raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return None
        tail = self.tail.match(text, at)
        assert tail is not None  # every part of it may be missing
        rest = text[tail.end() :]
        if self.end is not None and self.end not in tail[0]:
            if not last:
                return None
            if rest.strip() and self.end.startswith(rest.strip()):  # the mark itself is cut off
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
JSON = Format(  # nothing but an object; what a grammar makes of a call that must be
    opens=("<|python_tag|>", "{"),
    head=re.compile(r"\s*(?:<\|python_tag\|>)?\s*(?=\{)"),
    tail=re.compile(r"(?:\s*;(?=\s*\{))?"),
    call=f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}',
)
LLAMA = replace(JSON, call=f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}')

FORMATS = (DEEPSEEK, DEEPSEEK_V31, HERMES, MISTRAL, LLAMA, JSON)  # the last two also stand within others


def format_of(text: str, name: str) -> Format | None:
    """The format in which a call of `name` stands in a text; None where it does in none."""

    def plain(some: str) -> str:
        return "".join(some.split())

    found = []
    for form in FORMATS:
        starts = [at for mark in form.opens if (at := text.find(mark)) >= 0]
        read = form.read(text[min(starts) :]) if starts else None
        if read is not None and read[0][0].name == name:
            found.append(form)
    written = [form for form in found if plain(form.halves(name)[0]) in plain(text)]
    return next(iter(written or found), None)


def as_json(value: Any) -> str:
    """JSON that can be sent: half characters are escaped, which no UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False)
    return text if whole(text) else json.dumps(value)


def as_object(text: str) -> dict[str, Any] | None:
    """A call's arguments as an object; None where they are none that can be shown, be it that a model went astray."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or too_deep(value):
        return None
    return value if whole_inside(value) else None


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than any use needs and recursive code can follow."""
    level = [value]
    for _ in range(DEEPEST):
        level = [v for some in level for v in (some.values() if isinstance(some, dict) else some)]
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} cannot be sent on as JSON")
    return value


# Models put line breaks into strings.
DECODER = json.JSONDecoder(strict=False, parse_float=_number, parse_constant=_number)


def _call(value: Any, name: str | None) -> Call | None:
    """A call from its JSON: arguments alone where the name stood outside, and perhaps as a text of JSON."""
    arguments = value
    if name is None:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
            return None
        arguments = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str) and arguments.strip():
        arguments = as_object(arguments)
    elif arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict) or too_deep(arguments) or not name or not whole(name):
        return None
    return Call(name, as_json(arguments))
