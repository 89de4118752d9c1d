"""Two replicas on Ray Serve: prefixes find their cache, and one that ends is replaced."""

import asyncio
import itertools
import json
import random
import re
import time
from importlib.util import find_spec

import httpx
import pytest
import torch

from rorqual.engine import SamplingParams
from rorqual.serve.front import build_front
from rorqual.serve.service import Options

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra cluster")]
ARGUMENTS = {"max_num_seqs": 4, "kv_cache_bytes": 1 << 22, "prefix_cache": True, "dtype": torch.float32}


@pytest.fixture(scope="module")
def handle(directory):
    from rorqual.serve.replicas import replicas

    with replicas(directory, 2, ARGUMENTS, SamplingParams(temperature=0), Options("tiny")) as handle:
        yield handle


class InTurn:
    """The handle, with requests going round the replicas."""

    def __init__(self, handle):
        self.handle, self.numbers = handle, itertools.count()

    def options(self, **options):
        return InTurn.Answer(self.handle.options(**options), self.numbers)

    class Answer:
        def __init__(self, handle, numbers):
            self.handle, self.numbers = handle, numbers

        @property
        def answer(self):
            return self

        def remote(self, scope, body, prefix, number):
            return self.handle.answer.remote(scope, body, prefix=prefix, number=next(self.numbers))


def client(handle):
    app = build_front(handle, 2, Options("tiny"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=300)


async def conversations(handle, seed):
    """Four turns of six conversations, mixed → the share of prompt tokens found in caches, and replicas of each."""
    rng = random.Random(seed)
    texts = [[rng.randrange(5, 250) for _ in range(150)] for _ in range(6)]
    cached = total = 0
    places = [set() for _ in texts]
    async with client(handle) as front:
        for turn in range(4):
            for i in rng.sample(range(6), 6):
                body = {"prompt": texts[i], "max_tokens": 8, "ignore_eos": True}
                answer = await front.post("/v1/completions", json=body)
                usage = answer.json()["usage"]
                places[i].add(answer.headers["x-replica"])
                if turn:
                    cached += usage["prompt_tokens_details"]["cached_tokens"]
                    total += usage["prompt_tokens"]
                texts[i] += [rng.randrange(5, 250) for _ in range(40)]
    return cached / total, places


def test_conversations_stay_where_their_prefix_is_cached(handle):
    share, places = asyncio.run(conversations(handle, 0))
    assert all(len(place) == 1 for place in places)
    assert len(set.union(*places)) == 2
    in_turn, scattered = asyncio.run(conversations(InTurn(handle), 1))
    print(f"prompt tokens from caches: {share:.1%} by prefix, {in_turn:.1%} in turn")
    assert any(len(place) == 2 for place in scattered)
    # Of prompts of 190, 230 and 270 tokens, the full blocks of the 150, 190 and 230 that were there before.
    assert share == pytest.approx((144 + 176 + 224) / (190 + 230 + 270))
    assert in_turn < share - 0.1


def test_a_replica_that_is_killed_is_replaced_and_the_other_goes_on(handle):
    import ray

    def running(text):
        return set(re.findall(r'rorqual_kv_cache_blocks{replica="(\w+)"}', text))

    async def talk(front, begun, prompt):
        body = {"prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        async with front.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            begun.set_result(answer.headers["x-replica"])
            events = [json.loads(x[6:]) async for x in lines if x.startswith("data: {")]
            return events

    async def run():
        # Not httpx.ASGITransport, which gives an answer only when it is whole.
        server, url = await listen(build_front(handle, 2, Options("tiny")))
        async with httpx.AsyncClient(base_url=url, timeout=300) as front:
            before = running((await front.get("/metrics")).text)
            begun = [asyncio.get_running_loop().create_future() for _ in range(2)]
            talks = [asyncio.ensure_future(talk(front, b, [9 + i] * 40)) for i, b in enumerate(begun)]
            names = [await b for b in begun]
            assert set(names) == before
            actors = ray.util.list_named_actors(all_namespaces=True)
            (actor,) = (a for a in actors if a["name"].endswith(f"#Replica#{names[0]}"))
            ray.kill(ray.get_actor(**actor))
            lost, kept = await asyncio.gather(*talks)
            assert "send the request again" in lost[-1]["error"]["message"]
            assert kept[-1]["choices"][0]["finish_reason"] == "length"
            answer = await front.post("/v1/completions", json={"prompt": [9] * 40, "max_tokens": 3, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == 3
            until = time.monotonic() + 240
            while len(after := running((await front.get("/metrics")).text)) < 2:
                assert time.monotonic() < until, after
                await asyncio.sleep(0.5)
            assert names[1] in after
            assert names[0] not in after
        server.should_exit = True
        await asyncio.sleep(0.5)

    asyncio.run(run())


async def listen(app):
    """A server of this loop, and its URL."""
    import uvicorn

    from rorqual.serve.server import bind

    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    task = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    server.task = task
    return server, f"http://127.0.0.1:{listening.getsockname()[1]}"
