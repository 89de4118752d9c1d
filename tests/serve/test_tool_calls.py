"""Calls in what models say, whole or letter by letter, and the grammars that keep them to their schemas."""

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rorqual.data.call_reader import CallReader
from rorqual.data.tool_formats import DEEPSEEK, DEEPSEEK_V31, HERMES, JSON, LLAMA, MISTRAL, Call
from rorqual.engine.grammar import GrammarCompiler, json_grammar
from rorqual.engine.outputs import TokenDelta
from rorqual.errors import UserError
from rorqual.serve.protocol import ChatRequest
from rorqual.serve.responses import ChatChoice
from rorqual.serve.tool_calls import ToolCallDelta, call_grammar, callable_tools

FORMS = {"hermes": HERMES, "v3": DEEPSEEK, "v3.1": DEEPSEEK_V31, "mistral": MISTRAL, "llama": LLAMA, "json": JSON}
ADD, TAKE = Call("add", '{"a": {"b": "</tool_call> }"}}'), Call("take", "{}")
BOTH = {"add", "take"}


def read(form, said, step=10_000, names=BOTH, parallel=True):
    """What is shown, and the calls, where a text comes `step` letters at a time."""
    reader, shown, calls = CallReader(form, names, parallel), "", []
    for start in range(0, len(said), step):
        text, found = reader.feed(said[start : start + step], last=start + step >= len(said))
        shown, calls = shown + text, calls + found
    return shown, calls, reader.cut_off


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_format_writes_it_reads(form, step):
    form = FORMS[form]
    before = "" if form.bare else "I look < here.\n"
    for calls in ([ADD], [ADD, TAKE]):
        said = before + form.write(calls)
        assert read(form, said, step) == (before, calls, False)
        assert read(form, said + "\nDone.", step) == (before + "\nDone.", calls, False)
        assert read(form, said, step, parallel=False) == (before, calls[:1], False)


LOOK = [Call("look", '{"x": 1}')]


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize(
    ("form", "said", "shown", "calls"),
    [
        ("hermes", 'a<tool_call>{"name":"look","arguments":{"x":1}}</tool_call>b', "ab", LOOK),
        ("hermes", '<tool_call>{"name": "look", "parameters": {"x": 1}}', "", LOOK),  # they forget the end
        ("hermes", '<tool_call>{"name": "look", "arguments": "{\\"x\\": 1}"}</tool_call>', "", LOOK),  # JSON as text
        ("hermes", '<tool_call>{"name": "take", "arguments": null}</tool_call>', "", [TAKE]),
        ("hermes", '<tool_call>{"name": "take"}</tool_call>', "", [TAKE]),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"x": "a\nb"}}</tool_call>', "",
         [Call("look", '{"x": "a\\nb"}')]),
        ("hermes", '<tool_call>{no</tool_call> <tool_call>{"name": "take"}</tool_call>', "<tool_call>{no</tool_call> ",
         [TAKE]),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"x": "\\ud800"}}</tool_call>', "",
         [Call("look", '{"x": "\\ud800"}')]),  # which no UTF-8 can hold
        ("v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>", "",
         [Call("look", "{}")]),
        ("v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{\"x\": 1}<｜tool▁call▁end｜>", "", LOOK),
        ("mistral", '[TOOL_CALLS] [{"name": "look", "arguments": {"x": 1}, "id": "abcdefghi"}]', "", LOOK),
        ("mistral", '[TOOL_CALLS]look[ARGS]{"x": 1}[TOOL_CALLS]take{}', "", [*LOOK, TAKE]),
        ("llama", '<|python_tag|>{"name": "look", "parameters": {"x": 1}}; {"name": "take", "parameters": {}}', "",
         [*LOOK, TAKE]),
        ("llama", ' {"type": "function", "name": "look", "parameters": {"x": 1}}', "", LOOK),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(form, said, shown, calls, step):
    assert read(FORMS[form], said, step, names={"look", "take"})[:2] == (shown, calls)


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("hermes", "a < b <tool"),
        ("hermes", "<tool_call>{not json}</tool_call>"),
        ("hermes", '<tool_call>{"name": "x"'),
        ("hermes", '<tool_call>{"name": "x", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "x", "arguments": {"a": 1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "x", "arguments": ' + '{"a": ' * 500 + "1" + "}" * 501 + "</tool_call>"),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("hermes", '<tool_call>{"name": "\\ud800"}</tool_call>'),
        ("v3", "<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>"),
        ("llama", '{"name": "Ann", "parameters": {}}'),  # no function's name: JSON that was asked for
        ("llama", 'Look: {"name": "add", "parameters": {}}'),
        ("llama", '{"x": 1}'),
        ("mistral", "[TOOL_CALLS]"),
    ],
)
def test_what_only_looks_like_a_call_is_shown(form, said, step):
    assert read(FORMS[form], said, max(step, len(said) // 200))[:2] == (said, [])


def test_a_call_is_given_as_soon_as_it_is_whole():
    reader = CallReader(HERMES, BOTH)
    first, half = HERMES.write([ADD]), '<tool_call>{"name": "ta'
    assert reader.feed(first, last=False)[1] == [ADD]
    assert reader.feed(half, last=False) == ("", [])
    assert reader.feed("", last=True) == (half, [])
    assert reader.cut_off


def test_calls_have_ids_of_their_own():
    _, made = CallReader(HERMES, BOTH).feed(HERMES.write([ADD, ADD]), last=True)
    assert len({ToolCallDelta(call).as_dict()["id"] for call in made}) == 2


# -- grammars

PLACE = {"type": "object", "properties": {"row": {"const": "A"}}, "required": ["row"], "additionalProperties": False}
NESTED = {
    "$defs": {"Place": PLACE}, "definitions": {"Place": PLACE}, "type": "object",
    "properties": {"a": {"$ref": "#/$defs/Place"}, "b": {"$ref": "#/definitions/Place"}, "more": {"$ref": "#"}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
FITS = '{"a": {"row": "A"}, "b": {"row": "A"}}'
MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁end｜>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
]


def request(**change):
    functions = [{"name": "book", "parameters": NESTED}, {"name": "list"}]
    tools = [{"type": "function", "function": f} for f in functions]
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "?"}], "tools": tools} | change)


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(mode, *names):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def strict(name="book"):
    tools = [t.for_template() for t in request().tools]
    return [t | {"function": t["function"] | {"strict": t["function"]["name"] == name}} for t in tools]


def compiler_of(marks):
    """Grammars for a vocabulary of bytes and these marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *alphabet])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<end>"])
    words.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    compiler = GrammarCompiler(tokenizer, len(tokenizer), (0,))
    compiler.tokenizer = tokenizer
    return compiler


def guided(compiler, grammar):
    """A guide from the answer's beginning."""
    return compiler.start(grammar, None, thinking=False, may_think=True)


@pytest.fixture(scope="module")
def compiler():
    return compiler_of([])


@pytest.fixture(scope="module", params=["letters", "tokens"])
def follows(request):
    """Whether an answer is one of a grammar's, where marks are letters or tokens of their own."""
    compiler = compiler_of(MARKS if request.param == "tokens" else [])
    marks = {token.content: number for number, token in compiler.tokenizer.added_tokens_decoder.items()}

    def check(form, body, said, answer=None):
        guide, made = guided(compiler, call_grammar(body, form, marks, answer)), []
        for token in [*compiler.tokenizer(said, add_special_tokens=False).input_ids, 0]:
            if guide.forbidden(made, None)[token]:
                return False
            made.append(token)
        return True

    return check


BOOK, LIST = '{"name": "book", "arguments": %s}', '{"name": "list", "arguments": %s}'


@pytest.mark.parametrize(
    ("choice", "said", "right"),
    [
        (named("book"), BOOK % FITS, True),
        (named("book"), BOOK % '{"a": {"row": "B"}, "b": {"row": "A"}}', False),
        (named("book"), LIST % "{}", False),
        ("required", BOOK % FITS, True),
        ("required", BOOK % (FITS[:-1] + f', "more": {FITS}}}'), True),
        ("required", LIST % "{}", True),  # no parameters: an empty list of them
        ("required", LIST % '{"x": 1}', False),
        ("required", "none", False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("list")]}}, LIST % "{}", True),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("list")]}},
            BOOK % FITS,
            False,
        ),
    ],
)
def test_a_call_that_must_be_made_fits_its_schema(follows, choice, said, right):
    assert follows(HERMES, request(tool_choice=choice), said) is right


@pytest.mark.parametrize("form", ["hermes", "v3", "v3.1", "mistral", "llama"])
def test_strict_functions_are_called_by_their_schemas(follows, form):
    form, body = FORMS[form], request(tools=strict())
    right, wrong, other = Call("book", FITS), Call("book", '{"a": 1}'), Call("list", '{"any": [1]}')
    for said, good in [
        ("No call <at all.", True),
        (form.write([right]), True),
        (form.write([other, right]), True),
        (form.write([wrong]), False),
        (form.write([other, wrong]), False),
    ]:
        assert follows(form, body, said) is good, said
    if not form.bare:
        assert follows(form, body, "I look." + form.write([right]))
        assert not follows(form, body, "I look." + form.write([wrong]))


@pytest.mark.parametrize("form", ["hermes", "v3", "mistral", "llama"])
def test_an_answer_of_a_schema_may_be_a_call_instead(follows, form):
    form, body, schema = FORMS[form], request(), {"type": "object", "properties": {"sum": {"const": 1}}}
    assert follows(form, body, form.write([Call("list", "{}")]), schema)
    assert follows(form, body, '{"sum": 1}', schema)
    assert not follows(form, body, "one", schema)


LOOPS = {"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"}
DEEP = {"type": "object", "properties": {"a": {"type": "array"}}}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def test_what_no_text_can_follow_is_refused(compiler):
    tools = [{"type": "function", "function": {"name": "book", "parameters": {"anyOf": [LOOPS["$defs"]["A"]]} | LOOPS}}]
    loops = call_grammar(request(tools=tools, tool_choice="required"), HERMES, {})
    for grammar, says in (
        (loops, r"^tools cannot be followed: .*level exceeded$"),
        (json_grammar(LOOPS), r"^the json schema cannot be followed: no text fits it"),
    ):
        with pytest.raises(UserError, match=says):
            guided(compiler, grammar)
    for change in (
        {"tools": [{"type": "function", "function": {"name": "book", "parameters": DEEP}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}},
        {"structured_outputs": {"json": DEEP}},
    ):
        with pytest.raises(ValidationError, match="nested too deeply"):
            request(**change)


@pytest.mark.parametrize(
    ("said", "right"),
    [('{"a": 1}', True), ('{\n    "a": [\n        1\n    ]\n}', True), ('{\r\n"a":1}', True), ("{\n\n\n}", False),
     ("{" + " " * 21 + "}", False), ('{"a":\n\n\n1}', False)],
)  # fmt: skip
def test_white_space_within_json_comes_to_an_end(compiler, said, right):
    guide = guided(compiler, json_grammar(None))
    ids = compiler.tokenizer(said, add_special_tokens=False).input_ids
    assert all(not guide.forbidden(ids[:n], None)[token] for n, token in enumerate(ids)) is right


# -- answers


@pytest.mark.parametrize(
    ("said", "finish", "wanted"),
    [
        (HERMES.write([ADD]), "stop", (1, "tool_calls")),
        (HERMES.write([ADD]) + '<tool_call>{"na', "length", (1, "length")),
        (HERMES.write([ADD]), "length", (1, "length")),
        (HERMES.write([ADD]) + '<tool_call>{"na', "stop", (1, "stop")),  # at a stop string
        ('<tool_call>{"na', "length", (0, "length")),
        ("So.", "stop", (0, "stop")),
        (HERMES.write([ADD, TAKE]), "stop", (2, "tool_calls")),
        (HERMES.write([ADD]), "cancelled", (1, "cancelled")),
    ],
)
def test_only_a_list_of_calls_that_is_whole_is_called_so(said, finish, wanted):
    choice = ChatChoice(0, None, CallReader(HERMES, BOTH), False, 0)
    chunks = [choice.add(TokenDelta(0, letter, "", letter, [0], [], [], None, 0, 0)) for letter in said]
    chunks.append(choice.add(TokenDelta(0, "", "", "", [0], [], [], finish, 0, 0)))
    streamed = [c for chunk in chunks if chunk for c in chunk["delta"].get("tool_calls", [])]
    assert (len(streamed), chunks[-1]["finish_reason"]) == wanted
    assert [c["index"] for c in streamed] == list(range(wanted[0]))
    whole = choice.whole()
    assert (len(whole["message"].get("tool_calls", [])), whole["finish_reason"]) == wanted


def test_no_more_is_kept_than_has_to_be():
    assert call_grammar(request(), HERMES, {}) is None
    assert call_grammar(request(tool_choice="none"), HERMES, {}, {"type": "object"}) is None
    assert [t.function.name for t in callable_tools(request())] == ["book", "list"]
    assert [t.function.name for t in callable_tools(request(tool_choice=allowed("auto", "list")))] == ["list"]
