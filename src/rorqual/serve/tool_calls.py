"""Tool calls: the functions that a request allows, grammars that constrain calls, and calls of answers."""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from rorqual.data.tool_formats import JSON, Call, Format
from rorqual.engine import Grammar
from rorqual.engine.grammar import bounded
from rorqual.serve.json_types import FunctionJson, ToolCallJson
from rorqual.serve.protocol import AllowedTools, ChatRequest, Function, Tool, ToolChoice


def callable_tools(request: ChatRequest) -> list[Tool]:
    """The functions that may be called; the prompt describes no others."""
    tools, choice = request.tools or [], request.tool_choice
    if choice == "none":
        return []
    if isinstance(choice, AllowedTools):
        return [t for t in tools if t.function.name in choice.names()]
    return tools


def must_call(request: ChatRequest) -> bool:
    choice = request.tool_choice
    if isinstance(choice, AllowedTools):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, ToolChoice)


# -- grammars


def call_grammar(
    request: ChatRequest, form: Format, marks: dict[str, int], answer: dict[str, Any] | None = None
) -> Grammar | None:
    """A grammar that constrains calls to their schemas; None where there is nothing to constrain.

    A required call is one JSON object with name and arguments. Else an answer is text and calls in the model's format,
    with arguments of their schemas for `strict` functions and any for others; or, with `answer`, calls or JSON of that
    schema. marks: added tokens, text → id.
    """
    choice, functions = request.tool_choice, [t.function for t in callable_tools(request)]
    if not functions:
        return None
    if must_call(request):
        called = [f for f in functions if not isinstance(choice, ToolChoice) or f.name == choice.function.name]
        rules = ["start: call", *_calls(called, JSON, marks, exact=True)]
    elif answer is not None or any(f.strict for f in functions):
        answers = _answer(form, marks, answer, request.parallel_tool_calls)
        rules = [*answers, *_calls(functions, form, marks, exact=False)]
    else:
        return None
    return Grammar("lark", "\n".join(rules), "tools")


def _calls(functions: list[Function], form: Format, marks: dict[str, int], exact: bool) -> list[str]:
    """Rules for a call of any of these functions. exact: apply the schemas of all, strict or not."""
    rules = ["call: " + " | ".join(f"call_{n}" for n in range(len(functions)))]
    for n, function in enumerate(functions):
        before, after = form.halves(function.name)
        if form.bare:  # the bracket apart, since JSON of another form begins with it too
            opening = f'"{{" {_literal(before.removeprefix("{"), marks)}'
        else:  # the opening mark is in the rule `open`
            opening = _literal(before if form.around[0] else before.removeprefix(form.opens[0]), marks)
        schema = function.schema_ if exact or function.strict else {"type": "object"}
        rules += [
            f"call_{n}: {opening} arguments_{n} {_literal(after, marks)}",
            f"arguments_{n}: %json {json.dumps(bounded(schema))}",
        ]
    return rules


def _answer(form: Format, marks: dict[str, int], answer: dict[str, Any] | None, parallel: bool) -> list[str]:
    """Rules for an answer: text with calls in it, or either calls or JSON."""
    mark, (begin, end), between = form.opens[0], form.around, _literal(form.between, marks)
    again = f"({between} call)*" if parallel else ""
    if form.bare:
        calls = f"call {again}"
    elif begin:
        calls = f"open {_literal(begin.removeprefix(mark), marks)} call {again} {_literal(end, marks)}"
    else:
        calls = f"open call ({between} open call)*" if parallel and answer is not None else "open call"
    if answer is not None:
        opened = f"open: {_literal(mark, marks)}"
        return ["start: calls | answer", f"answer: %json {json.dumps(bounded(answer))}", f"calls: {calls}", opened]
    if form.bare:
        return ["start: calls | TEXT?", f"calls: {calls}", r"TEXT: /[^{](.|\n)*/"]
    # A mark that is a token is unambiguous; one spelt in letters counts at its first appearance.
    opened = f"open: TEXT {_literal(mark, marks)}" if mark in marks else f"open[lazy]: TEXT {_literal(mark, marks)}"
    return [f"start: calls{'*' if parallel else '?'} TEXT", f"calls: {calls}", opened, r"TEXT: /(.|\n)*/"]


def _literal(text: str, marks: dict[str, int]) -> str:
    """A text as a grammar literal, with token ids for marks."""
    known = sorted((m for m in marks if m and m in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
    return " ".join(f"<[{marks[p]}]>" if p in marks else json.dumps(p, ensure_ascii=False) for p in parts if p)


# -- answers


@dataclass
class ToolCallDelta:
    """A call in an answer, and its id."""

    call: Call
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> ToolCallJson:
        function: FunctionJson = {"name": self.call.name, "arguments": self.call.arguments}
        return {"id": self.id, "type": "function", "function": function}
