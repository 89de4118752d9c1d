"""Queues, keys, clients that leave, and ends."""

import asyncio
import random
import threading
import time

import httpx
import openai
import pytest

from rorqual.errors import UserError
from rorqual.serve.run import check_address, read_keys

LONG = {"model": "tiny", "prompt": "what is", "max_tokens": 400, "ignore_eos": True}


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


def test_a_full_queue_says_when_to_come_back(start):
    server = start(slots=2, waiting=1)
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
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}) as answer:
        next(answer.iter_lines())
        assert server.service.engine.status().blocks_held > 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=LONG | {"n": 8}, timeout=0.05)
    assert server.settled() == 0
    assert server.service.engine.status().counts.made_tokens < 400 * 9


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thousand_requests_some_of_which_leave_or_are_nonsense(start, caplog):
    server = start(slots=8, cache_bytes=1 << 17, waiting=2000)
    statuses: list[int] = []

    async def one(client, rng):
        body = {"model": "tiny", "prompt": "what is " * rng.randint(1, 20), "max_tokens": rng.randint(1, 12),
                "n": rng.randint(1, 2), "stream": rng.random() < 0.5}  # fmt: skip
        kind = rng.random()
        if kind < 0.1:
            body["prompt"] = "both, " * 2500  # longer than the context
        elif kind < 0.2:
            body |= rng.choice([{"temperature": "hot"}, {"n": 0}, {"prompt": None}, {"stop": 5}])
        try:
            timeout = rng.uniform(0.001, 0.1) if kind > 0.7 else 120
            answer = await client.post("/v1/completions", json=body, timeout=timeout)
        except httpx.TimeoutException:
            return
        statuses.append(answer.status_code)
        assert answer.status_code == (400 if kind < 0.2 else 200)

    async def all_of_them():
        rng = random.Random(0)
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:
            await asyncio.gather(*(one(client, rng) for _ in range(1000)))

    asyncio.run(all_of_them())
    assert statuses.count(200) > 400
    assert statuses.count(400) > 100
    assert server.settled() == 0
    assert not [r for r in caplog.records if r.exc_info]


def test_the_end_waits_for_what_was_accepted(start):
    server = start()
    answers = []

    def ask():
        answers.append(server.client().completions.create(model="tiny", prompt="what", max_tokens=300, seed=1,
                                                          extra_body={"ignore_eos": True}))  # fmt: skip

    asking = [threading.Thread(target=ask) for _ in range(6)]
    for thread in asking:
        thread.start()
    while server.service.worker.count < 6:
        time.sleep(0.002)
    server.stop()
    for thread in asking:
        thread.join()
    assert [a.usage.completion_tokens for a in answers] == [300] * 6


def test_an_engine_that_fails_says_so_and_goes_on(start, monkeypatch):
    server = start()
    engine = server.service.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    answer = httpx.post(server.url + "/v1/completions", json=LONG)
    assert answer.status_code == 500
    assert "send the request again" in answer.json()["error"]["message"]
    monkeypatch.setattr(engine, "step", step)
    assert httpx.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200


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
    check_address("127.0.0.1", (), False)
