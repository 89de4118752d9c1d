"""The front of several replicas, without Ray: what it passes on, and what it does when a replica ends."""

import asyncio
import json

import httpx
import pytest

from rorqual.engine.prefix_router import PIECE, prefix_keys
from rorqual.serve.front import build_front, merged_metrics, prompt_of
from rorqual.serve.service import Options

TURN = {"role": "user", "content": "abc" * 200}
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class Handle:
    """Like Ray Serve's: each call plays the next of `scripts`, lists of messages and exceptions."""

    def __init__(self, *scripts):
        self.scripts, self.calls, self.cancelled = list(scripts), [], 0

    def options(self, stream):
        assert stream
        return self

    @property
    def answer(self):
        return self

    def remote(self, scope, body, prefix, number):
        self.calls.append((scope, body, prefix, number))
        return Answer(self, self.scripts.pop(0))


class Answer:
    def __init__(self, handle, script):
        self.handle, self.script = handle, script

    async def __aiter__(self):
        for part in self.script:
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.sleep(60)
            yield part

    def cancel(self):
        self.handle.cancelled += 1


def body(text, more=False):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def ask(handle, path="/v1/completions", options=None, **request):
    async def run():
        app = build_front(handle, 2, options or Options("tiny"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, **request) if "json" in request else await client.get(path, **request)

    return asyncio.run(run())


def test_a_request_goes_on_as_it_came_with_the_keys_of_its_prompt():
    handle = Handle([[START, body("data: 1\n\n", more=True)], [body("data: [DONE]\n\n")]])
    prompt = "x" * (2 * PIECE)
    answer = ask(handle, "/v1/completions?a=b", json={"prompt": prompt}, headers={"Origin": "http://localhost:3000"})
    assert answer.text == "data: 1\n\ndata: [DONE]\n\n"
    assert answer.headers.get_list("access-control-allow-origin") == ["http://localhost:3000"]
    ((scope, sent, prefix, number),) = handle.calls
    assert json.loads(sent) == {"prompt": prompt}
    assert (scope["path"], scope["query_string"]) == ("/v1/completions", b"a=b")
    assert prefix == prefix_keys(prompt.encode())
    assert number is None
    assert b"origin" not in dict(scope["headers"])


def test_a_request_whose_replica_ends_goes_to_another_unless_it_has_been_answered_in_part():
    handle = Handle([RuntimeError("died")], [[START, body("all")]])
    assert ask(handle, json={"prompt": "x"}).text == "all"
    handle = Handle([[START, body("data: 1\n\n", more=True)], RuntimeError("died")])
    first, error, end = ask(handle, json={"prompt": "x"}).text.strip().split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert "send the request again" in json.loads(error.removeprefix("data: "))["error"]["message"]
    handle = Handle(*[[RuntimeError("died")]] * 2)  # no more: the request may be why
    assert ask(handle, json={"prompt": "x"}).status_code == 500
    assert handle.cancelled == 2


def test_without_replicas_requests_are_told_so(monkeypatch):
    monkeypatch.setattr("rorqual.serve.front.READ_SECONDS", 0.05)
    answer = ask(Handle([None]), json={"prompt": "x"}, options=Options("tiny", timeout=0.05))
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    for path in ("/health", "/metrics"):
        assert ask(Handle(*[[RuntimeError("died")]] * 2), path).status_code == 503


def test_keys_are_checked_before_a_replica_is_asked():
    handle = Handle()
    assert ask(handle, json={"prompt": "x"}, options=Options("tiny", keys=("secret",))).status_code == 401
    assert not handle.calls


def test_metrics_are_those_of_every_replica():
    text = '# HELP a_total A\n# TYPE a_total counter\na_total{path="/x"} %d\n'
    replies = [[[START | {"headers": [(b"x-replica", name.encode())]}, body(text % i)]] for i, name in enumerate("uv")]
    lines = ask(Handle(*replies), "/metrics").text.splitlines()
    assert 'a_total{path="/x",replica="u"} 0.0' in lines
    assert 'a_total{path="/x",replica="v"} 1.0' in lines
    assert merged_metrics({}) == b""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "abc" * 200}, {"max_tokens": 3, "prompt": "abc" * 150}),
        ({"prompt": list(range(400))}, {"prompt": list(range(300)), "n": 2}),
        ({"messages": [TURN]}, {"stream": True, "messages": [TURN, {"role": "assistant", "content": "d"}]}),
    ],
)
def test_bodies_with_a_common_prefix_share_keys(one, other):
    first, second = (prefix_keys(prompt_of(json.dumps(some).encode())) for some in (one, other))
    assert first[0] == second[0]


@pytest.mark.parametrize("bad", [b"", b"{", b"[1]", b"\xff", b'"text"', b"[" * 100_000])
def test_bad_bodies_have_no_prefix(bad):
    assert prompt_of(bad) == b""
