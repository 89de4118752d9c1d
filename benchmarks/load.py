"""Requests to a server that streams OpenAI's completions, and when their tokens came.

The client shares the servers' cores, so it does as little as it can: it notes the time of every event and reads only
the last one. `official` is the openai package instead, to check that against.
"""

import asyncio
import functools
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "model"  # what every server calls it
LONGEST = 1024  # tokens of a prompt, or of an answer
SAYS = re.compile(rb'"text": ?"[^"]')  # an event that brings some text


@dataclass(frozen=True)
class Ask:
    prompt: str
    tokens: int  # of the answer, whatever the model would rather
    sampled: bool = False  # as R1 was evaluated, else greedy


@dataclass
class Answer:
    start: float
    times: list[float] = field(default_factory=list)  # of its events
    prompt: int = 0  # tokens, as the server counted them
    made: int = 0


Send = Callable[[int, Ask], Awaitable[Answer]]  # the first is the server's port


def asks(count: int, seed: str, longest: int = LONGEST, sampled: bool = False) -> list[Ask]:
    """Lengths as in ShareGPT's conversations, log-normal: prompts of 215 tokens on average and answers of 198.

    Those are the averages of what vLLM's benchmark takes from the data: its reports have 215 196 and some 198 000
    tokens in 1000 requests. Prompts are passages of a novella that comes with reasoning-gym: real words, so that every
    tokenizer has its usual work, and hardly ever the same beginning twice.
    """
    generator = random.Random(seed)
    spec = find_spec("reasoning_gym")
    assert spec is not None
    words = (Path(spec.origin or "").parent / "data" / "in_the_year_2889.txt").read_text().split()

    def length(median: float) -> int:
        return round(min(max(generator.lognormvariate(np.log(median), 0.9), 4), longest))

    found = []
    for _ in range(count):
        said, wanted = round(length(148) / 1.33), length(136)  # tokens a word
        at = generator.randrange(len(words) - said)
        found.append(Ask(" ".join(words[at : at + said]), wanted, sampled))
    return found


# -- how a request is sent


def _settings(ask: Ask) -> dict[str, Any]:
    way = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0} if ask.sampled else {"temperature": 0}
    wanted = {"model": MODEL, "max_tokens": ask.tokens} | way
    return wanted | {"stream": True, "stream_options": {"include_usage": True}}


class _Exchange(asyncio.Protocol):
    """One request over a connection of its own, answered in events that end with an empty line."""

    def __init__(self, request: bytes, answer: Answer) -> None:
        self.request, self.answer = request, answer
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._rest, self._last = b"", b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if SAYS.search(event):
                self.answer.times.append(now)
            elif b'"usage"' in event:
                self._last = event

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            usage = json.loads(self._last[self._last.index(b"data: ") + 6 :])["usage"]
            self.answer.prompt, self.answer.made = usage["prompt_tokens"], usage["completion_tokens"]
            self.done.set_result(self.answer)
        except (ValueError, KeyError, TypeError):
            said = (self._last + self._rest)[-400:].decode(errors="replace")
            self.done.set_exception(RuntimeError(f"the answer broke off ({exc}): {said}"))


async def light(port: int, ask: Ask) -> Answer:
    """/v1/completions, asked without a library."""
    body = json.dumps(_settings(ask) | {"prompt": ask.prompt, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = Answer(time.perf_counter())
    loop = asyncio.get_running_loop()
    _, exchange = await loop.create_connection(lambda: _Exchange(head.encode() + body, answer), "127.0.0.1", port)
    return _checked(await exchange.done, ask)


def official() -> Send:
    """/v1/chat/completions, asked by the openai package: one client for all requests, as its users do."""
    from openai import AsyncOpenAI

    @functools.cache
    def client(port: int) -> AsyncOpenAI:
        # It tries again, as it does by itself, where a server closes a connection that has long been idle.
        return AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    async def send(port: int, ask: Ask) -> Answer:
        said: Any = [{"role": "user", "content": ask.prompt}]
        answer = Answer(time.perf_counter())
        stream = await client(port).chat.completions.create(
            messages=said, extra_body={"ignore_eos": True}, **_settings(ask)
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                answer.times.append(time.perf_counter())
            if chunk.usage is not None:
                answer.prompt, answer.made = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        return _checked(answer, ask)

    return send


def _checked(answer: Answer, ask: Ask) -> Answer:
    """Servers are compared over answers of the same lengths only."""
    if answer.made != ask.tokens or not answer.times:
        raise RuntimeError(f"{ask.tokens} tokens were asked for, {answer.made} came in {len(answer.times)} events")
    return answer


# -- when requests are sent


async def closed_loop(port: int, wanted: Sequence[Ask], clients: int, send: Send = light) -> list[Answer]:
    """`clients` at a time, each sending its next request as soon as it has its answer."""
    left = iter(wanted)

    async def client() -> list[Answer]:
        return [await send(port, ask) for ask in left]

    return [answer for found in await asyncio.gather(*(client() for _ in range(clients))) for answer in found]


async def poisson(port: int, wanted: Sequence[Ask], rate: float, seed: str, send: Send = light) -> list[Answer]:
    """Requests that come by chance, `rate` a second on average, whether or not others have been answered."""
    generator, at, sent = random.Random(seed), time.perf_counter(), []
    for ask in wanted:
        at += generator.expovariate(rate)
        await asyncio.sleep(at - time.perf_counter())
        sent.append(asyncio.ensure_future(send(port, ask)))
    return list(await asyncio.gather(*sent))


def _made_by(time: float, answer: Answer) -> float:
    """Tokens, where every event of the answer has as many."""
    return answer.made * sum(t <= time for t in answer.times) / len(answer.times)


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Tokens and requests a second from the first request to the last token, and latencies in milliseconds.

    busy: until the last request came, before clients had nothing more to ask. ttft: time to first token; tpot: time per
    output token after the first event, of every answer; itl: between two events, which bring several tokens where
    guesses were right.
    """
    began, last = min(a.start for a in answers), max(a.start for a in answers)
    seconds = max(a.times[-1] for a in answers) - began
    first = [1e3 * (a.times[0] - a.start) for a in answers]
    gaps = np.concatenate([1e3 * np.diff(a.times) for a in answers])
    each = [1e3 * (a.times[-1] - a.times[0]) / max(1, a.made - 1) for a in answers]
    found = {
        "seconds": seconds,
        "tokens_per_second": sum(a.made for a in answers) / seconds,
        "busy_tokens_per_second": sum(_made_by(last, a) for a in answers) / (last - began or seconds),
        "requests_per_second": len(answers) / seconds,
        "prompt_tokens": sum(a.prompt for a in answers),
        "answer_tokens": sum(a.made for a in answers),
        "events_per_token": sum(len(a.times) for a in answers) / sum(a.made for a in answers),
    }
    for name, values in (("ttft", first), ("itl", gaps), ("tpot", each)):
        found |= {f"{name}_ms_p{p}": float(np.percentile(values, p)) for p in (50, 95)}
    return found
