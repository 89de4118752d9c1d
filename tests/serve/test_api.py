"""The API through OpenAI's own client."""

import asyncio
import gzip
import json

import httpx
import openai
import pytest

from rorqual.engine import Engine, SamplingParams
from rorqual.serve.responses import ENCODE
from rorqual.serve.sse import EventStream

NO_THINKING = {"chat_template_kwargs": {"think": False}}
ASK = [{"role": "user", "content": "what is 12 and 7?"}]
PLAIN = {"model": "tiny", "messages": ASK, "extra_body": NO_THINKING}


def test_what_is_streamed_is_what_comes_whole(client):
    settings = {"model": "tiny", "messages": ASK, "max_tokens": 40, "seed": 5, "extra_body": {"thinking_budget": 12}}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == message.content
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert thought == message.reasoning_content != ""
    assert "think>" not in thought + message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens <= 40
    assert usage.completion_tokens_details.reasoning_tokens == 12
    assert usage.prompt_tokens == usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_the_engine_and_the_service_say_the_same(directory, server, client):
    answer = client.completions.create(model="tiny", prompt="what is 12", max_tokens=20, temperature=0)
    alone = Engine(directory).generate(["what is 12"], SamplingParams(temperature=0, max_tokens=20))[0]
    assert answer.choices[0].text == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason


def test_several_prompts_and_answers_keep_their_order(client):
    settings = {"model": "tiny", "prompt": ["what", "is 7", "12"], "max_tokens": 6, "n": 3, "seed": 3}
    whole = client.completions.create(**settings)
    assert [c.index for c in whole.choices] == list(range(9))
    texts = [""] * 9
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in whole.choices]
    assert len(set(texts)) > 3


def test_prompts_that_begin_the_same_way_hit_the_cache(client):
    said = [{"role": "user", "content": "the sum of both, " * 12}]
    usages = [client.chat.completions.create(model="tiny", messages=said, max_tokens=2).usage for _ in range(2)]
    assert usages[1].prompt_cache_hit_tokens >= usages[1].prompt_tokens - 17 > 16
    assert usages[1].prompt_tokens_details.cached_tokens == usages[1].prompt_cache_hit_tokens


def test_log_probabilities_of_a_chat(client):
    answer = client.chat.completions.create(**PLAIN, max_tokens=8, logprobs=True, top_logprobs=4, temperature=1, seed=1)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace").lstrip("\n") == (
        answer.choices[0].message.content
    )
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-4
        assert sorted(entry.top_logprobs, key=lambda t: -t.logprob) == entry.top_logprobs


def test_log_probabilities_of_thoughts_and_of_what_a_grammar_forbids(client):
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, logprobs=True, top_logprobs=3, seed=1,
        extra_body={"thinking_budget": 5, "structured_outputs": {"choice": ["yes"]}},
    ).choices[0]  # fmt: skip
    assert len(answer.logprobs.reasoning_content) == 5
    said = answer.logprobs.content
    assert b"".join(bytes(e.bytes) for e in said) == b"yes"
    assert min(t.logprob for e in said for t in e.top_logprobs) == -9999  # JSON has no infinity


def test_three_answers_at_once(client):
    settings = {"model": "tiny", "messages": ASK, "max_tokens": 20, "n": 3, "seed": 4,
                "extra_body": {"thinking_budget": 6}}  # fmt: skip
    whole = client.chat.completions.create(**settings)
    said, thought, ends = [""] * 3, [""] * 3, [None] * 3
    for chunk in client.chat.completions.create(**settings, stream=True):
        for c in chunk.choices:
            said[c.index] += c.delta.content or ""
            thought[c.index] += getattr(c.delta, "reasoning_content", None) or ""
            ends[c.index] = c.finish_reason
    assert said == [c.message.content for c in whole.choices]
    assert thought == [c.message.reasoning_content for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert len(set(thought)) == 3
    assert 3 < whole.usage.completion_tokens_details.reasoning_tokens <= 18


def test_whoever_closes_a_stream_frees_its_blocks(server, client):
    stream = client.chat.completions.create(model="tiny", messages=ASK, n=4, stream=True, extra_body={
        "ignore_eos": True})  # fmt: skip
    for _ in zip(range(20), stream, strict=False):
        pass
    assert server.service.engine.status().blocks_used > 0
    stream.close()
    assert server.settled() == 0


def test_log_probabilities_of_a_text_and_its_prompt(server, client):
    answer = client.completions.create(
        model="tiny", prompt="what is 12", max_tokens=4, temperature=0, logprobs=2, echo=True
    ).choices[0]
    found = answer.logprobs
    assert answer.text.startswith("what is 12")
    assert found.token_logprobs[0] is None
    assert all(p <= 0 for p in found.token_logprobs[1:])
    assert "".join(found.tokens) == answer.text
    assert [answer.text[a:].startswith(t) for a, t in zip(found.text_offset, found.tokens, strict=True)]
    # What was made greedily was the most probable, and says so again when it is only scored.
    assert max(found.top_logprobs[-1].values()) == pytest.approx(found.token_logprobs[-1], abs=1e-4)
    again = client.completions.create(model="tiny", prompt=answer.text, max_tokens=0, logprobs=2, echo=True).choices[0]
    assert again.logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1:], abs=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


def test_an_answer_of_a_given_schema_after_free_thoughts(client):
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=120, seed=1, extra_body={"thinking_budget": 10},
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ).choices[0]  # fmt: skip
    found = json.loads(answer.message.content)
    assert 0 <= found["sum"] <= 99
    assert isinstance(found["sure"], bool)
    assert answer.finish_reason == "stop"
    assert answer.message.reasoning_content


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"regex": "[0-9]{3}-[0-9]{2}"}, lambda t: len(t) == 6 and t[3] == "-"),
        ({"choice": ["yes", "no", "per\"haps"]}, lambda t: t in ("yes", "no", "per\"haps")),
        ({"grammar": 'start: "a" | "b" start "c"'}, lambda t: t.strip("bc") == "a"),
        ({"json": SCHEMA}, lambda t: set(json.loads(t)) == {"sum", "sure"}),
    ],
)  # fmt: skip
def test_structured_outputs(client, wanted, fits):
    answer = client.chat.completions.create(
        **PLAIN | {"extra_body": NO_THINKING | {"structured_outputs": wanted}}, max_tokens=200, seed=1
    )
    assert fits(answer.choices[0].message.content), answer.choices[0].message.content


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "adds",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [12, 13]}, "b": {"enum": [7]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "take")
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(client, stream):
    settings = {**PLAIN, "tools": TOOLS, "max_tokens": 100, "stream": stream, "seed": 1}
    choice = {"type": "function", "function": {"name": "take"}}
    found = client.chat.completions.create(**settings, tool_choice=choice)
    if stream:
        chunks = [c.choices[0] for c in found]
        calls = [call for c in chunks for call in c.delta.tool_calls or []]
        reason = chunks[-1].finish_reason
    else:
        calls, reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
    assert reason == "tool_calls"
    (call,) = calls
    assert call.function.name == "take"
    assert call.id
    assert json.loads(call.function.arguments) in ({"a": 12, "b": 7}, {"a": 13, "b": 7})
    said = [*ASK, {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": {
        "name": "take", "arguments": call.function.arguments}}]},
        {"role": "tool", "tool_call_id": call.id, "content": "5"}]  # fmt: skip
    after = client.chat.completions.create(**PLAIN | {"messages": said}, tools=TOOLS, max_tokens=3)
    assert after.choices[0].finish_reason in ("length", "stop")


def test_stop_strings_end_the_answer_and_not_the_thoughts(client):
    body = {"thinking_budget": 6, "structured_outputs": {"grammar": 'start: "one;two;three"'}}
    settings = {"model": "tiny", "messages": ASK, "max_tokens": 60, "seed": 1, "stop": [";th"]}
    found = client.chat.completions.create(**settings, extra_body=body)
    assert found.choices[0].message.content == "one;two"
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "both " * 2500}]}, "context"),
        ({"max_tokens": 9000}, "context"),
        ({"n": 9999}, "n"),
        ({"logit_bias": {"99999": 1}}, "- logit_bias: token ids"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}}, "schema"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"top_logprobs": 3}, "logprobs: true"),
        *(({"extra_body": {"chat_template_kwargs": {name: "{{ 1 }}"}}}, "chat_template_kwargs.*leave it out")
          for name in ("chat_template", "messages", "conversations", "self", "tools")),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         r"messages\.0\.content\.0\.type"),
        ({"stop": 5}, "^(?!.*stop.str).*stop: .*string; or .*list"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"extra_body": {"stop_token_ids": [1 << 70]}}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(client, change, says):
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": ASK} | change)
    assert set(refused.value.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b'{"prompt": [-1], "echo": true}', "prompt.0"),
        ("/v1/completions", b'{"prompt": [300000], "echo": true, "max_tokens": 0}', "prompt"),
        ("/v1/completions", b'{"prompt": ["a", "a", "a"], "n": 128}', "n"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', "prompt"),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}', "logit_bias"),
        ("/tokenize", b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function":'
         b'{"name": "f", "parameters": {"\\ud800": 1}}}]}', "tools"),
        ("/detokenize", b'{"tokens": [99999999999999]}', "tokens.0"),
    ],
)  # fmt: skip
def test_what_no_client_library_would_send(server, path, body, param):
    answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_other_mistakes_have_their_status(server, client):
    with pytest.raises(openai.NotFoundError, match="'huge'"):
        client.chat.completions.create(model="huge", messages=ASK)
    assert httpx.post(server.url + "/v1/chat/completions", content="{").status_code == 400
    assert httpx.post(server.url + "/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    assert httpx.get(server.url + "/v1/models/tiny").json()["max_model_len"] == 2048


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_json_by_another_name(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    content = json.dumps({"messages": ASK, "max_tokens": 2, "n": None}).encode()
    assert httpx.post(server.url + "/v1/chat/completions", content=content, headers=headers).status_code == 200
    refused = httpx.post(server.url + "/tokenize", content=b"prompt=a", headers=headers)
    assert refused.status_code == 400
    assert kind is None or kind in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("HEAD", "/health", 200, None),
        ("HEAD", "/v1/models", 200, None),
        ("HEAD", "/v1/chat/completions", 405, "POST"),
        ("GET", "/v1/completions", 405, "POST"),
        ("DELETE", "/v1/models/tiny", 405, "GET"),
        ("OPTIONS", "/v1/completions", 405, "POST"),
        ("PUT", "/tokenize", 405, "POST"),
        ("POST", "/health", 405, "GET"),
        ("POST", "/v1/completions/", 404, None),
        ("POST", "/tokenize/", 404, None),
        ("POST", "//v1/completions", 404, None),
        ("POST", "/v1//completions", 404, None),
        ("GET", "/v1/models?limit=5", 200, None),
        ("TRACE", "/v1/models", 405, None),
    ],
)
def test_methods_and_paths(server, method, path, status, allow):
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert (answer.content == b"") == (method == "HEAD")
    assert allow is None or answer.headers["allow"] == allow
    assert status == 200 or method == "HEAD" or set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_packed_is_not_unpacked(server):
    body = gzip.compress(json.dumps({"messages": ASK}).encode())
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["error"]["param"] == "Content-Encoding"


def test_a_completion_has_the_form_that_is_asked_for(client):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    answer = client.completions.create(
        model="tiny", prompt="what", max_tokens=200, seed=1, extra_body={"response_format": form}
    )
    assert set(json.loads(answer.choices[0].text)) == {"sum", "sure"}


@pytest.mark.parametrize(("effort", "status"), [(None, 200), ("medium", 200), ("high", 400)])
def test_an_effort_is_for_templates_that_read_it(server, effort, status, monkeypatch):
    body = {"messages": ASK, "max_tokens": 2, "reasoning_effort": effort}
    assert httpx.post(server.url + "/v1/chat/completions", json=body).status_code == status
    told = []
    prompt = server.service.chat_prompt
    monkeypatch.setattr(server.service, "template", server.service.template + "{{ reasoning_effort }}")
    monkeypatch.setattr(server.service, "chat_prompt", lambda *a, **k: (told.append(a[-1]), prompt(*a, **k))[1])
    assert httpx.post(server.url + "/v1/chat/completions", json=body).status_code == 200
    assert told == [{"reasoning_effort": effort} if effort else {}]


def test_an_event_is_one_line_whatever_it_says():
    said = {"text": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"}
    sent = []

    async def events():
        yield ENCODE(said)

    async def send(message):
        sent.append(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    asyncio.run(EventStream(events(), 10.0, lambda: None)({"type": "http"}, receive, send))
    lines = b"".join(sent).decode().splitlines()
    assert [json.loads(line.removeprefix("data: ")) for line in lines if line] == [said]


def test_tokens_there_and_back(server):
    said = httpx.post(server.url + "/tokenize", json={"prompt": "the sum 🐋"}).json()
    assert said["count"] == len(said["tokens"])
    assert said["max_model_len"] == 2048
    back = httpx.post(server.url + "/detokenize", json={"tokens": said["tokens"]})
    assert back.json() == {"prompt": "the sum 🐋"}
    assert httpx.post(server.url + "/tokenize", json={"messages": ASK}).json()["count"] > 5
    assert httpx.post(server.url + "/detokenize", json={"tokens": [-1]}).status_code == 400


def test_figures_for_prometheus(server, client):
    client.completions.create(model="tiny", prompt="what", max_tokens=3)
    text = httpx.get(server.url + "/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["rorqual_generated_tokens_total"]) >= 3
    assert float(figures['rorqual_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(figures["rorqual_time_to_first_token_seconds_count"]) >= 1
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
