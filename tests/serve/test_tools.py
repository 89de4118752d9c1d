"""Calls in what models say, whole or letter by letter."""

import json

import pytest

from rorqual.serve.protocol import Tool
from rorqual.serve.tools import DEEPSEEK, HERMES, CallReader, marker_of, told

HERMES_SAID = 'I look.\n<tool_call>\n{"name": "add", "arguments": {"a": {"b": 1}}}\n</tool_call>'
V3_SAID = (
    "I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": {"b": 1}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31_SAID = (
    "I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
    '{"a": {"b": 1}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


@pytest.mark.parametrize(("marker", "said"), [(HERMES, HERMES_SAID), (DEEPSEEK, V3_SAID), (DEEPSEEK, V31_SAID)])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_call_is_found_and_not_shown(marker, said, step):
    reader, shown, calls = CallReader(marker, forced=False), "", []
    for start in range(0, len(said), step):
        text, found = reader.feed(said[start : start + step], last=start + step >= len(said))
        shown, calls = shown + text, calls + found
    assert shown == "I look.\n"
    (call,) = calls
    assert call.name == "add"
    assert json.loads(call.arguments) == {"a": {"b": 1}}


def test_several_calls_have_their_own_names():
    _, calls = CallReader(HERMES, forced=False).feed(HERMES_SAID + HERMES_SAID, last=True)
    assert len(calls) == len({c.id for c in calls}) == 2
    _, calls = CallReader(HERMES, forced=False, several=False).feed(HERMES_SAID + HERMES_SAID, last=True)
    assert len(calls) == 1


@pytest.mark.parametrize("said", ["a < b <tool", "<tool_call>{not json}</tool_call>", '<tool_call>{"name": "x"'])
def test_what_only_looks_like_a_call_is_shown(said):
    assert CallReader(HERMES, forced=False).feed(said, last=True) == (said, [])


def test_templates_without_tools_are_told_of_them():
    tool = Tool.model_validate({"type": "function", "function": {"name": "add", "parameters": {}}})
    asked = [{"role": "user", "content": "what?"}]
    (system, question) = told(asked, [tool], "{{ messages }}")
    assert "add" in system["content"]
    assert "<tool_call>" in system["content"]
    assert question == asked[0]
    assert told(asked, [tool], "{% if tools %}") == asked
    assert marker_of("… <｜tool▁calls▁begin｜> …") == DEEPSEEK
