"""What a body may say, field by field, without a server."""

import json

import pytest
from pydantic import ValidationError

from rorqual.serve.api_errors import ApiError
from rorqual.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rorqual.serve.request_body import DEEPEST, MAX_VALUES, parse_body
from rorqual.serve.request_fields import Ignored, OnlyDefaults

ASK = {"messages": [{"role": "user", "content": "?"}]}
TEXT = {"prompt": "?"}
TOOL = {"type": "function", "function": {"name": "f"}}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": None}}}
BASES = {ChatRequest: ASK, CompletionRequest: TEXT, TokenizeRequest: TEXT, DetokenizeRequest: {"tokens": [1]}}


def read(body, model=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_body(raw, model or (ChatRequest if "messages" in body else CompletionRequest))


@pytest.mark.parametrize("model", BASES)
def test_null_is_a_field_not_given(model):
    base = BASES[model]
    for name, field in model.model_fields.items():
        if name not in base:
            assert read(base | {field.alias or name: None}, model) == read(base, model), name
            assert name not in read(base | {name: None}, model).model_fields_set
    assert read(base | {"whatever": None}, model) == read(base, model)


@pytest.mark.parametrize(
    ("nulls", "without"),
    [
        ({"stream_options": {"include_usage": None}}, {"stream_options": {}}),
        ({"response_format": {"type": "text", "json_schema": None}}, {"response_format": {"type": "text"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": FORM["json_schema"] | {"strict": None}}},
            {"response_format": FORM},
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}]},
            {"tools": [TOOL]},
        ),
        (
            {"structured_outputs": {"json": None, "regex": "a", "choice": None}},
            {"structured_outputs": {"regex": "a"}},
        ),
        (
            {"messages": [{"role": "user", "content": "?", "tool_calls": None, "tool_call_id": None, "name": None}]},
            ASK,
        ),
    ],
)
def test_so_it_is_further_in(nulls, without):
    assert read(ASK | nulls) == read(ASK | without)


def test_what_is_free_keeps_its_nulls():
    body = read(ASK | {"response_format": FORM, "chat_template_kwargs": {"a": None}})
    assert body.response_format.json_schema.schema_ == {"const": None}
    assert body.chat_template_kwargs == {"a": None}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperatur": 0.5}, "temperatur"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"thinking": {"type": "disabled"}}, "thinking"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"response_format": {"type": "text", "shape": 1}}, "response_format.shape"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parametres": {}}}]}, "tools.0.function.parametres"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"verbosity": "low"}, "verbosity"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 1e400}, "n"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"stop": [None]}, "stop.0"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"messages": [None]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages.0"),
    ],
)
def test_what_is_not_done_is_refused_by_name(change, param):
    raw = json.dumps(ASK | change).replace("Infinity", "1e400").encode()
    with pytest.raises(ApiError) as refused:
        read(raw, ChatRequest)
    assert refused.value.status == 400
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize(
    ("field", "remedy"),
    [("temperatur", "did you mean temperature"), ("guided_json", "structured_outputs"), ("functions", "tools"),
     ("zzz", "leave it out")],
)  # fmt: skip
def test_an_unknown_field_comes_with_a_remedy(field, remedy):
    with pytest.raises(ApiError, match=remedy):
        read(ASK | {field: 1})


def test_two_fields_must_not_say_different_things():
    assert read(ASK | {"max_tokens": 5, "max_completion_tokens": 5})
    assert read(TEXT | {"n": 2, "best_of": 2})
    for body in (
        ASK | {"max_tokens": 5, "max_completion_tokens": 6},
        ASK | {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        TEXT | {"best_of": 3},
    ):
        with pytest.raises(ApiError):
            read(body)
    for change in ({"tools": [TOOL]}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"a": 1}},
                   {"continue_final_message": True}):  # fmt: skip
        with pytest.raises(ApiError, match="goes with messages"):
            read(TEXT | change, TokenizeRequest)
    with pytest.raises(ApiError, match="goes with a prompt"):
        read(ASK | {"add_special_tokens": True}, TokenizeRequest)


def test_what_changes_nothing_is_taken():
    for base in (ASK, TEXT):
        for name in Ignored.model_fields:
            for value in (1, "a", {"a": [1]}):
                assert read(base | {name: value})
        usual = {
            name: field.get_default(call_default_factory=True) for name, field in OnlyDefaults.model_fields.items()
        }
        assert read(base | {name: value for name, value in usual.items() if value is not None})
    assert read(ASK | {"verbosity": "medium", "modalities": ["text"], "echo": False, "n": 1.0, "top_k": 5.0}).n == 1
    assert read(TEXT | {"suffix": "", "stop": [], "logit_bias": {}})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]), ([], [])],
)
def test_a_prompt_is_one_of_four_kinds(prompt, prompts):
    assert read({"prompt": prompt}).prompts() == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [({}, "prompt"), (5, "prompt"), (["a", 1], "prompt.1"), ([1, "a"], "prompt.1"), ([[1], "a"], "prompt.1"),
     ([[1, -1]], "prompt.0.1"), ([True], "prompt.0"), ([1 << 31], "prompt.0")],
)  # fmt: skip
def test_another_prompt_is_none(prompt, param):
    with pytest.raises(ApiError) as refused:
        read({"prompt": prompt})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("raw", "kind", "status", "says"),
    [
        (b"", "", 400, "empty"),
        (b" \n", "", 400, "empty"),
        (b"\xef\xbb\xbf", "", 400, "JSON"),
        (b"[]", "", 400, "must be a JSON object"),
        (b'"a"', "", 400, "must be a JSON object"),
        (b"null", "", 400, "must be a JSON object"),
        (b"{", "", 400, "not valid JSON"),
        (b'{"prompt": "a"} x', "", 400, "not valid JSON"),
        (b"prompt=a", "application/x-www-form-urlencoded", 400, r"Content-Type: application/x-www-form-urlencoded"),
        (b'{"prompt": "\xff"}', "", 400, "UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "", 400, "UTF-8"),
        (b'{"prompt": "a"}', "application/json; charset=utf-16", 415, "charset utf-16"),
        (b'{"prompt": "a", "top_p": NaN}', "", 400, "NaN"),
        (b'{"prompt": "a", "top_p": -Infinity}', "", 400, "Infinity"),
        (b'{"prompt": "a", "n": 1, "n": 2}', "", 400, "n: the field is given twice"),
        (b'{"prompt": "a", "structured_outputs": {"json": {"a": 1, "a": 2}}}', "", 400, "a: the field is given twice"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "", 400, "JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "", 400, "nested"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "", 400, "nested"),
        (b'{"prompt": "a", "stop": ["\\ud800"]}', "", 400, "^stop holds half a character"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_words(raw, kind, status, says):
    with pytest.raises(ApiError, match=says) as refused:
        parse_body(raw, CompletionRequest, kind)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "application/json; charset=UTF-8", "text/json; charset", "text/plain",
     "application/x-www-form-urlencoded", "nonsense"],
)  # fmt: skip
def test_json_is_read_whatever_it_is_called(kind):
    assert parse_body(b'\xef\xbb\xbf{"prompt": "a \\ud83d\\udc0b"}', CompletionRequest, kind).prompt == "a 🐋"


def test_a_body_may_be_as_deep_as_a_schema_is():
    schema = {"type": "object"}
    for i in range(DEEPEST // 2 - 4):
        schema = {"type": "array", "items": [schema]} if i % 2 else {"properties": {"a": schema}}
    assert read(TEXT | {"structured_outputs": {"json": schema}})


def test_the_number_of_values_is_limited_and_that_of_commas_in_a_text_is_not():
    with pytest.raises(ApiError, match=str(MAX_VALUES)) as refused:
        read({"prompt": [1] * (MAX_VALUES + 9)})
    assert refused.value.status == 413
    for text in ("a,b,[", '"a\\",'):
        assert read({"prompt": text * MAX_VALUES})


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "nobody"}] * 5000},
        {"messages": [{"role": "user", "content": "?"}] * 100_000},
        ASK | {"tools": [{}] * 900},
        ASK | {"tools": [TOOL] * 5000},
        ASK | {"stop": [1] * 5000},
        ASK | {"stop_token_ids": ["a"] * 5000},
        ASK | {"structured_outputs": {"choice": [1] * 900}},
        ASK | {"logit_bias": {str(i): "a" for i in range(5000)}},
        ASK | {"modalities": ["a"] * 5000},
        ASK | {"bad_words": [1] * 5000},
        ASK | {f"x{i}": 1 for i in range(5000)},
        {"prompt": [-1] * 5000},
        {"prompt": [[-1]] * 5000},
        {"prompt": [1, *["a"] * 5000]},
    ],
)
def test_only_the_first_of_many_errors_is_noted(body):
    """To note all of them took a minute and a half for a body of 8 MiB, and nobody else was answered."""
    with pytest.raises(ValidationError) as refused:
        (ChatRequest if "messages" in body else CompletionRequest).model_validate(body)
    assert refused.value.error_count() <= 40
