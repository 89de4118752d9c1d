"""Tool calls: the functions that a request allows, grammars that constrain calls, and a parser of calls in text."""

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


# -- parser


@dataclass
class ToolCallDelta:
    """A call in an answer, and its id."""

    call: Call
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> ToolCallJson:
        function: FunctionJson = {"name": self.call.name, "arguments": self.call.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Splits an answer's text, as it comes, into text to show and calls, each as soon as it is complete.

    names: the functions that may be called. parallel: more than one call may follow. `cut_off`: the text ended within a
    call, which is then shown as text.
    """

    def __init__(self, form: Format, names: set[str], parallel: bool = True) -> None:
        self._form, self._names, self._parallel = form, names, parallel
        self._held, self._searched = "", 0  # text not returned yet; how much of it was searched for a call's end
        self._has_text = False  # text other than calls was found
        self._calls = 0
        self._after = False  # a call has just ended
        self.cut_off = False

    def feed(self, piece: str, last: bool) -> tuple[str, list[ToolCallDelta]]:
        """Add text → text to show, and complete calls. last: no more text follows."""
        self._held += piece
        shown, calls = "", []
        while self._held and (not self._after or self._skip_close(last)):
            at, begun = self._find_call(last)
            shown += self._take_text(at)
            if not begun or not (last or self._may_end()):
                break
            read = self._form.read(self._held, self._names, last)
            if read is not None:
                self._held, self._searched, self._after = self._held[read[1] :], 0, True
                calls += read[0] if self._parallel else read[0][: 1 - self._calls]
                self._calls += len(read[0])
            elif last:  # no call, or an incomplete one
                self.cut_off = self._form.end is None or self._form.end not in self._held
                shown += self._take_text(self._mark_length())
            else:
                break
        return shown, [ToolCallDelta(call) for call in calls]

    def _take_text(self, length: int) -> str:
        """Remove and return the first `length` characters of the held text."""
        text, self._held = self._held[:length], self._held[length:]
        self._has_text = self._has_text or bool(text.strip())
        self._searched = 0 if text else self._searched
        return text

    def _find_call(self, last: bool) -> tuple[int, bool]:
        """The index at which a call starts, and whether its mark is complete; the text's length where none does."""
        held, opens = self._held, self._form.opens
        if self._form.bare:
            word = held.lstrip()
            begun = word.startswith(opens)
            possible = begun or (not last and _is_prefix(word, opens))
            return (0, begun) if possible and not self._has_text else (len(held), False)
        found = [at for mark in opens if (at := held.find(mark)) >= 0]
        if found:
            return min(found), True
        longest = 0 if last else min(len(held), max(map(len, opens)) - 1)
        return next((len(held) - n for n in range(longest, 0, -1) if _is_prefix(held[-n:], opens)), len(held)), False

    def _mark_length(self) -> int:
        """The length of the mark at the start of the held text; of all of it for a form without marks."""
        if self._form.bare:
            return len(self._held)
        return next(len(mark) for mark in self._form.opens if self._held.startswith(mark))

    def _may_end(self) -> bool:
        end = self._form.end
        if end is None:
            return False
        start, self._searched = max(0, self._searched - len(end)), len(self._held)
        return end in self._held[start:]

    def _skip_close(self, last: bool) -> bool:
        """Skip the text that closes calls; False where more text is needed to tell what follows."""
        word, close = self._held.lstrip(), self._form.close
        if close and word.startswith(close):
            self._held = word[len(close) :]
            return True
        if close.startswith(word):
            self._held = "" if last else self._held
            return False
        if word.startswith(self._form.opens):
            self._held = word
        elif not last and _is_prefix(word, self._form.opens):
            return False
        self._after = False
        return True


def _is_prefix(text: str, marks: tuple[str, ...]) -> bool:
    """Whether a text may be the start of a mark."""
    return any(mark.startswith(text) for mark in marks)
