"""Conversations with tools in the templates of released models, shortened where they do not matter here."""

import json

import pytest

from rorqual.data.chat_messages import read_messages, read_tools, without_nulls
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.tokenizer import train_tokenizer
from rorqual.data.tool_formats import DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA, MISTRAL
from rorqual.errors import UserError
from rorqual.recipe import TokenizerSection

TEMPLATES = {
    # DeepSeek R1's first: it shows calls only where the content is none, and joins their arguments to text.
    "r1": """\
{%- for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}{% endif %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' and m['content'] is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for c in m['tool_calls'] %}{{ ('\\n' if not loop.first else '') + '<｜tool▁call▁begin｜>' + c['type']
 + '<｜tool▁sep｜>' + c['function']['name'] +
 '\\n```json\\n' + c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜>' + eos_token }}{% endif %}
{%- if m['role'] == 'assistant' and m['content'] is not none %}
{{- '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}
{%- if m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""",
    "v3.1": """\
{%- if tools %}Tools:{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + (m['content'] or '') }}
{%- if m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' }}{% for c in m['tool_calls'] %}
{{- '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments'] }}
{{- '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}{{ eos_token }}{% endif %}
{%- if m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""",
    "qwen": """\
{%- if tools %}<|im_start|>system
# Tools{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson)
 + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # Llama 3.1: tools before the first question, one call a message, and nothing beside it.
    "llama": """\
{%- for m in messages %}
{%- if m.role in ('tool', 'ipython') %}{{ '<|start|>ipython<|end|>' + (m.content | tojson) + '<|eot|>' }}
{%- elif 'tool_calls' in m %}
{%- if not m.tool_calls | length == 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}
{{- '<|start|>assistant<|end|>{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}<|eot|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|end|>' }}
{%- if tools and loop.first %}Functions:{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{{- (m.content | trim) + '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}""",
    # Mistral's: ids of nine letters, users and assistants by turns.
    "mistral": """\
{%- set ns = namespace(user=true) %}
{%- for m in messages %}
{%- if m.role in ('user', 'assistant') and not m.tool_calls %}
{%- if (m.role == 'user') != ns.user %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.user = not ns.user %}{% endif %}
{%- if m.role == 'user' %}
{%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{% set out = c.function | tojson %}
{%- if c.id | length != 9 %}{{ raise_exception('IDs should be of length 9!') }}{% endif %}
{{- out[:-1] + ', "id": "' + c.id + '"}' + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('IDs should be of length 9!') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    # Gemma's: no tools, no system, users and assistants by turns.
    "gemma": """\
{%- for m in messages %}
{%- if m.role not in ('user', 'assistant') %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<turn>' + m.role + '\\n' + (m.content | trim) + '</turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}""",
    "silent": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
ARGUMENTS = '{"city": "Oslo"}'
TOOLS = [{"type": "function", "function": {"name": "look", "description": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def template():
    """A tokenizer's by its name here, or by its text."""
    tokenizer = train_tokenizer(["some text"], TokenizerSection(vocab_size=270))

    def of(name):
        tokenizer.chat_template = TEMPLATES.get(name, name)
        return ChatTemplate(tokenizer)

    return of


def call(arguments=ARGUMENTS, name="look", **more):
    return {
        "id": "call_0123456789abcdef01234567",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    } | more


def history(*calls, content=None, results=("rain",)):
    calls = calls or (call(),)
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        *({"role": "tool", "tool_call_id": c["id"], "content": r} for c, r in zip(calls, results, strict=True)),
    ]


def rendered(template, messages, tools=TOOLS, **more):
    return template.render(read_messages(messages, "messages"), read_tools(tools, "tools"), **more)


FORMATS = {
    "r1": DEEPSEEK, "v3.1": DEEPSEEK_V31, "qwen": HERMES, "llama": LLAMA, "mistral": MISTRAL, "gemma": HERMES,
    "silent": HERMES,
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_templates_format_is_found_and_its_tools_are_told(template, name):
    shown = template(name)
    assert shown.tool_support(True).format is FORMATS[name]
    text = rendered(shown, [{"role": "user", "content": "Oslo?"}])
    assert "weather" in text
    assert shown.tool_support(True).shows_tools == (name in ("v3.1", "qwen", "llama", "mistral"))


@pytest.mark.parametrize(
    "arguments",
    [ARGUMENTS, {"city": "Oslo"}, '{"city":"Oslo"}', "", None, "{}", "[[[", "[" * 100_000,
     '{"a": ' * 300 + "1" + "}" * 300, '"Oslo"', "null", '{"half": "\\ud800"}'],
)  # fmt: skip
@pytest.mark.parametrize("content", [None, "", "I look."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_history_of_calls_is_lost_or_refused(template, name, content, arguments):
    shown = template(name)
    text = rendered(shown, [*history(call(arguments), content=content), {"role": "assistant", "content": "So."}])
    assert "look" in text
    assert "rain" in text
    assert text.index("look") < text.rindex("rain") < text.rindex("So.")
    assert (content or "") in text or name == "mistral"  # which shows no words beside calls
    if isinstance(arguments, dict) or arguments == ARGUMENTS:
        form = shown.tool_support(True).format
        begin = form.opens[0] if form.around[0] else form.halves("look")[0].strip()
        calls, _ = form.read(text[text.rindex(begin) :], {"look"})
        assert [json.loads(c.arguments) for c in calls] == [{"city": "Oslo"}]
    if not arguments:
        assert "{}" in text
    assert "None" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_parallel_calls_and_their_results(template, name):
    one, two = call(id="call_1"), call('{"city": "Rome"}', id="call_2")
    text = rendered(template(name), history(one, two, results=("rain", "sun")))
    places = [text.index(word) for word in ("Oslo", "Rome", "rain", "sun")]
    assert max(places[2:]) > max(places[:1])
    if name == "llama":  # each result behind its call
        assert text.index("rain") < text.index("Rome") < text.index("sun")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "refusal", "refusal": "b"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "b"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
         {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                                           {"type": "output_text", "text": "b", "annotations": []}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "function_call": {"name": "look", "arguments": "b"}},
         {"role": "function", "name": "look", "content": "c"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call(id=None)]},
         {"role": "tool", "content": [{"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call()]},
         {"role": "tool", "content": None}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm",
          "audio": None, "annotations": [], "function_call": None, "refusal": None}],
    ],
)  # fmt: skip
def test_whatever_clients_send_back(template, name, messages):
    text = rendered(template(name), messages, tools=None)
    assert all(letter in text for letter in "ab")
    assert "None" not in text
    rendered(template(name), messages)


def test_arguments_stay_as_they_were_written_where_the_template_allows_it(template):
    for name, kept in (("r1", True), ("v3.1", True), ("qwen", False)):
        assert ('{"city":"Oslo"}' in rendered(template(name), history(call('{"city":"Oslo"}')))) is kept


def test_a_message_is_continued(template):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b \n"}]
    assert rendered(template("silent"), talk, None, unfinished=True) == "<|user|>a<|assistant|> b \n"
    assert rendered(template("qwen"), talk, unfinished=True).endswith("<|im_start|>assistant\n b \n")
    thinks = template("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    with pytest.raises(UserError, match="cannot be continued"):
        rendered(thinks, [{"role": "assistant", "content": "<think>a</think>b"}], None, unfinished=True)
    with pytest.raises(UserError, match="tool_calls cannot be continued"):
        rendered(template("qwen"), history()[:2], unfinished=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% if %}", "line 1"),
        ("{{ messages[7].content + 'x' }}", "does not accept"),
        ("{{ raise_exception('no talk today') }}", "no talk today"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "does not accept"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_fails_is_named(template, text, says):
    for messages in ([{"role": "user", "content": "a"}], history()):
        with pytest.raises(UserError, match=says):
            rendered(template(text), messages)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], r"^messages: must be a non-empty list"),
        ([None], r"^messages\.0: must be an object"),
        ([{"role": "robot", "content": "a"}], r"^messages\.0\.role: must be one of"),
        ([{"role": "user", "content": 5}], r"^messages\.0\.content: must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"^messages\.0\.content\.0\.type: only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"^messages\.0\.content\.0\.text: must be text"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"^messages\.0\.content\.0\.type: only text"),
        ([{"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}], r"\.content\.0\.type: only text"),
        ([{"role": "assistant", "content": [{"type": "thinking"}]}], r"\.content\.0\.thinking: must be text"),
        ([{"role": "user", "content": "a", "tool_calls": [call()]}], r"^messages\.0\.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}], r"^messages\.0\.tool_calls\.0"),
        ([{"role": "assistant", "tool_calls": "not JSON"}], r"^messages\.0\.tool_calls: is text, but not JSON"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(messages, says):
    with pytest.raises(UserError, match=says):
        read_messages(messages, "messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "reasoning", "reasoning": "hm"},
    ],
)
def test_thoughts_among_the_parts_are_thoughts(part):
    parts = [part, {"type": "text", "text": "So."}]
    (message,) = read_messages([{"role": "assistant", "content": parts}], "messages")
    assert (message["reasoning_content"], message["content"]) == ("hm", "So.")
    said = {"role": "assistant", "content": parts, "reasoning_content": "mine"}
    assert read_messages([said], "messages")[0]["reasoning_content"] == "mine"


@pytest.mark.parametrize(
    "tools",
    [TOOLS, TOOLS[0]["function"], json.dumps(TOOLS), [json.dumps(TOOLS[0])], [TOOLS[0]["function"]],
     [{"type": None, "function": TOOLS[0]["function"] | {"strict": None}}],
     [{"type": "function", "function": TOOLS[0]["function"] | {"parameters": '{"type": "object"}'}}]],
)  # fmt: skip
def test_tools_as_datasets_have_them(tools):
    if isinstance(tools, dict):
        with pytest.raises(UserError, match="tools: must be a list"):
            read_tools(tools, "tools")
    else:
        assert read_tools(tools, "tools") == TOOLS


def test_no_tools():
    assert all(read_tools(none, "tools") is None for none in (None, [], "", "[]", "null"))
    with pytest.raises(UserError, match=r"tools\.0: must be a function"):
        read_tools([{"type": "retrieval"}], "tools")
    deep = {"type": "object"}
    for _ in range(500):
        deep = {"items": deep}
    with pytest.raises(UserError, match=r"tools\.0: is nested too deeply"):
        read_tools([{"name": "look", "parameters": deep}], "tools")


def test_parquets_nulls_are_absent():
    given = {"a": None, "b": [{"c": None, "d": 0}, None], "e": [("k", 1)], "f": {"g": None}}
    assert without_nulls(given) == {"b": [{"d": 0}, None], "e": {"k": 1}, "f": {}}
