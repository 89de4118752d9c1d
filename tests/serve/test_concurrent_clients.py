"""Queues, keys, clients that leave, and ends."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from rorqual.errors import UserError
from rorqual.serve import sse
from rorqual.serve.server import bind, check_address, read_keys

LONG = {"model": "tiny", "prompt": "what is", "max_tokens": 400, "ignore_eos": True}
VERY_LONG = LONG | {"max_tokens": 2000}


def test_only_those_with_a_key_may_ask(start):
    server = start(keys=("first", "second"))
    for key in ("first", "second"):
        assert server.client(key).models.list().data[0].id == "tiny"
    for key in ("wrong", "first2", "é"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        answer = httpx.get(server.url + "/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(server.url + "/metrics").status_code == 401
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_request_that_is_too_large_is_not_read(start):
    server = start(max_body=1000)
    body = {"model": "tiny", "prompt": "what " * 1000}
    assert httpx.post(server.url + "/v1/completions", json=body).status_code == 413

    def pieces():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"what " * 10

    assert httpx.post(server.url + "/v1/completions", content=pieces()).status_code == 413


def test_a_request_that_does_not_come_to_its_end_is_not_waited_for(start):
    server = start(timeout=0.2)

    def pieces():
        yield b'{"prompt": "'
        while (
            server.service.metrics.registry.get_sample_value(
                "rorqual_requests_total", {"path": "/v1/completions", "status": "408"}
            )
            is None
        ):
            yield b" "
            time.sleep(0.01)

    assert httpx.post(server.url + "/v1/completions", content=pieces()).status_code == 408


def test_who_does_not_read_is_left(start, monkeypatch):
    monkeypatch.setattr(sse, "READ_SECONDS", 0.1)
    server = start(timeout=0.5)
    body = json.dumps({"prompt": "what is", "max_tokens": 500, "n": 100, "stream": True, "logprobs": 20})
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
        assert slow.recv(1)
        assert server.settled() == 0


def test_scoring_is_bounded_as_well(start):
    server = start(max_num_seqs=1, max_queue=0)
    ask = {"prompt": "what is", "max_tokens": 0, "echo": True, "logprobs": 1}
    with httpx.stream("POST", server.url + "/v1/completions", json=VERY_LONG | {"stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        assert httpx.post(server.url + "/v1/completions", json=ask).status_code == 429
    assert server.settled() == 0
    assert httpx.post(server.url + "/v1/completions", json=ask).status_code == 200


def test_a_full_queue_says_when_to_come_back(start):
    server = start(max_num_seqs=2, max_queue=1)
    client = server.client()
    with (
        client.completions.create(model="tiny", prompt="what", max_tokens=500, n=3, stream=True,
                                  extra_body={"ignore_eos": True}) as running
    ):  # fmt: skip
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="what", max_tokens=2)
        assert refused.value.response.headers["retry-after"] == "1"
    assert server.settled() == 0
    assert client.completions.create(model="tiny", prompt="what", max_tokens=2).choices


def test_a_request_that_takes_too_long_is_given_up(start):
    server = start(timeout=0.05)
    assert httpx.post(server.url + "/v1/completions", json=LONG).status_code == 504
    streamed = httpx.post(server.url + "/v1/completions", json=LONG | {"stream": True}).text
    assert "timeout_error" in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    assert server.settled() == 0


def test_who_leaves_frees_what_it_held(server):
    before = server.service.engine.status().counters.generated_tokens
    with httpx.stream("POST", server.url + "/v1/completions", json=VERY_LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()  # held, since the connection would close with it
        next(lines)
        assert server.service.engine.status().blocks_used > 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=VERY_LONG | {"n": 8}, timeout=0.05)
    assert server.settled() == 0
    assert server.service.engine.status().counters.generated_tokens - before < 2000 * 9


def test_the_end_waits_for_what_was_accepted(start):
    server = start()
    answers = []

    def ask():
        answers.append(server.client().completions.create(model="tiny", prompt="what", max_tokens=300, seed=1,
                                                          extra_body={"ignore_eos": True}))  # fmt: skip

    asking = [threading.Thread(target=ask) for _ in range(6)]
    for thread in asking:
        thread.start()
    while server.service.engine_thread.count < 6:
        time.sleep(0.002)
    server.stop()
    for thread in asking:
        thread.join()
    assert [a.usage.completion_tokens for a in answers] == [300] * 6


def test_an_engine_that_fails_says_so_and_goes_on(start, monkeypatch):
    server = start()
    engine = server.service.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *_: 1 / 0)
    answer = httpx.post(server.url + "/v1/completions", json=LONG)
    assert answer.status_code == 500
    assert "send the request again" in answer.json()["error"]["message"]
    monkeypatch.setattr(engine, "step", step)
    assert httpx.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200


def test_an_engine_that_cannot_go_on_refuses_requests(start, monkeypatch):
    server = start()
    monkeypatch.setattr(server.service.engine, "step", lambda *_: 1 / 0)
    monkeypatch.setattr(server.service.engine, "reset", lambda: 1 / 0)
    assert httpx.post(server.url + "/v1/completions", json=LONG).status_code == 500
    until = time.monotonic() + 60
    while httpx.get(server.url + "/health").status_code != 503:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert httpx.post(server.url + "/v1/completions", json=LONG).status_code == 503


def test_a_request_that_the_engine_cannot_take_concerns_nobody_else(start, monkeypatch):
    server = start()
    submit = server.service.engine.submit

    def panicking(prompt, params):
        if params.max_tokens == 7:
            raise BaseException("a panic in Rust")
        return submit(prompt, params)

    monkeypatch.setattr(server.service.engine, "submit", panicking)
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        assert httpx.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 7}).status_code == 500
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.settled() == 0


def test_the_context_is_what_the_cache_has_room_for(start):
    server = start(kv_cache_bytes=1 << 15)
    said = httpx.get(server.url + "/v1/models").json()["data"][0]["max_model_len"]
    assert said < 2048
    body = {"messages": [{"role": "user", "content": "what?"}]}  # without max_tokens: as long as there is room
    assert httpx.post(server.url + "/v1/chat/completions", json=body).status_code == 200
    refused = httpx.post(server.url + "/v1/chat/completions", json=body | {"max_tokens": said})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_keys_are_read_and_public_addresses_need_them(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n second \n")
    assert read_keys(path) == ("first", "second")
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(path)
    monkeypatch.setenv("RORQUAL_API_KEYS", "a, b")
    assert read_keys(None) == ("a", "b")
    with pytest.raises(UserError, match=r"0\.0\.0\.0"):
        check_address("0.0.0.0", (), False)
    check_address("0.0.0.0", ("a",), False)
    check_address("0.0.0.0", (), True)
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        check_address(host, (), False)
    for port in (70000, -1):
        with pytest.raises(UserError, match=str(port)):
            bind("127.0.0.1", port)
