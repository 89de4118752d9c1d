"""`rorqual serve` as a process: a thousand requests, of whatever kind, and its ends."""

import asyncio
import json
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

LONG = {"model": "tiny", "prompt": "what is", "max_tokens": 400, "ignore_eos": True}
NONSENSE = [
    {"content": b"{"},
    {"content": b"\xff\xfe"},
    {"content": b'{"prompt": "\\ud800"}'},
    {"json": []},
    {"json": {"prompt": "what", "temperature": "hot"}},
    {"json": {"prompt": "what", "n": 0}},
    {"json": {"prompt": None}},
    {"json": {"prompt": "what", "stop_token_ids": [1 << 70]}},
    {"json": {"prompt": [-1], "echo": True}},
]


async def ask(client, rng, counts):
    """One request: nonsense, over-long, one whose client leaves, or one that is answered in full."""
    kind = rng.random()
    stream = rng.random() < 0.5
    body = {"model": "tiny", "prompt": "what is " * rng.randint(1, 20), "max_tokens": rng.randint(1, 12),
            "n": rng.randint(1, 2), "stream": stream,
            "stream_options": {"include_usage": True}, "ignore_eos": True}  # fmt: skip
    request = {"json": body}
    if kind < 0.1:
        body["prompt"] = "both, " * 2500  # longer than the context
    elif kind < 0.2:
        request = rng.choice(NONSENSE)
    timeout, begun = rng.uniform(0.001, 0.1) if kind > 0.7 else 120, False
    try:
        async with client.stream("POST", "/v1/completions", **request, timeout=timeout) as answer:
            begun = True
            await answer.aread()
    except httpx.TimeoutException:
        assert kind > 0.7
        counts["left"] += 1
    except httpx.TransportError:
        counts["broken" if begun else "refused"] += 1
    else:
        assert answer.status_code == (400 if kind < 0.2 else 200), answer.text
        counts[answer.status_code] += 1
        if kind >= 0.2:
            assert tokens_of(answer.text, stream) == body["max_tokens"] * body["n"]


def tokens_of(text, stream):
    """Of an answer that has come to its end."""
    if stream:
        *_, text, end = (line.removeprefix("data: ") for line in text.splitlines() if line)
        assert end == "[DONE]"
    return json.loads(text)["usage"]["completion_tokens"]


def many(url, count, seed, counts):
    async def all_of_them():
        rng = random.Random(seed)
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            await asyncio.gather(*(ask(client, rng, counts) for _ in range(count)))

    asyncio.run(all_of_them())


@pytest.mark.parametrize("share", [0.08, pytest.param(1, marks=pytest.mark.slow)])
def test_a_thousand_requests_and_an_end_in_their_midst(serve, share):
    """Or a share of them."""
    server = serve("--port", "0", "--max-num-seqs", "8", "--max-queue", "2000", "--cache-gb", "0.001")
    counts = dict.fromkeys([200, 400, "left", "refused", "broken"], 0)
    first, later, talking = round(700 * share), round(240 * share), round(60 * share)
    many(server.url, first, 0, counts)
    assert counts[200] > 300 * share
    assert counts[400] > 100 * share
    assert counts["left"] > 50 * share
    assert counts["refused"] == counts["broken"] == 0
    for name in ("rorqual_samples_running", "rorqual_samples_waiting", "rorqual_cache_blocks_held"):
        server.wait_for(name, lambda value: value == 0)

    accepted = threading.Barrier(talking + 1)

    def long_talk(_):
        body = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 300, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            accepted.wait(60)
            return tokens_of("\n".join([first, *lines]), stream=True)

    def others_until_one_is_refused():
        asked = 0
        while not counts["refused"]:
            asked += later
            many(server.url, later, asked, counts)
        return asked

    with ThreadPoolExecutor(talking + 1) as pool:
        talks = pool.map(long_talk, range(talking))
        others = pool.submit(others_until_one_is_refused)
        accepted.wait(60)
        assert server.end(signal.SIGTERM) == 0
        assert list(talks) == [300] * talking
        asked = others.result()
    assert counts["broken"] == 0
    assert sum(counts.values()) == first + asked
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_after_a_kill_the_next_request_is_served(serve):
    server = serve("--port", "0", "--no-page")
    port = server.url.rpartition(":")[2]
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    again = serve("--port", port, "--no-page")
    assert again.url == server.url
    assert httpx.post(again.url + "/v1/completions", json=LONG, timeout=60).json()["usage"]["completion_tokens"] == 400
    assert again.end(signal.SIGINT) == 0
