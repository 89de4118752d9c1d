"""The front of several replicas: one address, from which requests go where their prefix is cached."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, cast

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.engine.prefix_router import prefix_keys
from rorqual.serve.api_errors import ApiError
from rorqual.serve.middleware import AuthMiddleware
from rorqual.serve.service import Options
from rorqual.serve.sse import READ_SECONDS, cancel_on_disconnect

TRIES = 2  # of a request whose replica ends before it answers; no more, since it may be what ended the replica
HEALTH_SECONDS = 10.0  # for /health and /metrics
log = logging.getLogger(__name__)
CARRIED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
           "client", "server")  # fmt: skip


def build_front(handle: Any, count: int, options: Options) -> ASGIApp:
    """The front's application. handle: of the deployment (serve/replicas.py), of `count` replicas."""
    return AuthMiddleware(
        Front(handle, count, options.timeout), keys=options.keys, host=options.host, origins=options.origins,
        max_body=options.max_body, timeout=options.timeout, count=lambda _scope, _status: None,
    )  # fmt: skip


class Front:
    """An ASGI application that passes requests on. What it asks of browsers (CORS) is asked once, here."""

    def __init__(self, handle: Any, count: int, timeout: float) -> None:
        self.handle, self.count, self.timeout = handle, count, timeout + READ_SECONDS  # after the replica's own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = await _body(receive)
        begun = False

        async def tracking_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        own = {"/health": self._health, "/metrics": self._metrics}.get(scope["path"])
        work = self._pass_on(scope, body, tracking_send) if own is None else own(_carried(scope))
        response = await cancel_on_disconnect(receive, work)
        if isinstance(response, Response) and not begun:  # a server also says "disconnect" after the answer's end
            await response(scope, receive, send)

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> Response | None:
        """Send a replica's answer as it comes. A request whose replica ends is sent to another, if the client has seen
        nothing of the answer.
        """
        carried, prefix = _carried(scope), prefix_keys(prompt_of(body))
        streaming = False
        for left in reversed(range(TRIES)):
            begun = False
            try:
                async with aclosing(self._messages(carried, body, prefix)) as messages:
                    async for message in messages:
                        begun = True
                        streaming |= _is_stream(message)
                        await send(message)
                return None
            except TimeoutError:
                return ApiError(503, "no replica is ready; retry later", Retry_After="5").response()
            except Exception as e:
                log.exception("%s %s: a replica failed", scope["method"], scope["path"])
                if not begun and left:
                    continue
                error = ApiError(500, f"the replica failed ({type(e).__name__}); send the request again")
                if not begun:
                    return error.response()
                if not streaming:
                    raise  # the connection breaks off
                text = f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n"
                await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
                return None
        return None

    async def _messages(
        self, scope: dict[str, Any], body: bytes, prefix: list[bytes], number: int | None = None
    ) -> AsyncGenerator[Message]:
        """Raises TimeoutError where no replica begins to answer in time."""
        answer = self.handle.options(stream=True).answer.remote(scope, body, prefix=prefix, number=number)
        messages = aiter(answer)
        try:
            async with asyncio.timeout(self.timeout):
                first = await anext(messages)
            for message in first:
                yield message
            async for some in messages:
                for message in some:
                    yield message
        finally:
            answer.cancel()  # no effect on one that has ended

    async def _whole(self, scope: dict[str, Any], number: int | None = None) -> tuple[int, str, str]:
        """→ status, replica and body."""
        status, name, body = 0, "", b""
        async with aclosing(self._messages(scope, b"", [], number)) as messages:
            async for message in messages:
                status = message.get("status", status)
                name = dict(message.get("headers", ())).get(b"x-replica", name.encode()).decode()
                body += message.get("body", b"")
        return status, name, body.decode()

    async def _health(self, scope: dict[str, Any]) -> Response:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                status, _, body = await self._whole(scope)
        except Exception:  # also a replica that has just ended
            log.exception("/health: no replica answers")
            return JSONResponse({"status": "no replica is ready"}, 503)
        return Response(body, status, media_type="application/json")

    async def _metrics(self, scope: dict[str, Any]) -> Response:
        """Every replica's, with its name as the label `replica`."""

        async def ask(number: int) -> tuple[int, str, str]:
            async with asyncio.timeout(HEALTH_SECONDS):
                return await self._whole(scope | {"path": "/metrics"}, number)

        found = await asyncio.gather(*map(ask, range(self.count)), return_exceptions=True)
        answers = [answer for answer in found if isinstance(answer, tuple)]
        texts = {name: text for status, name, text in answers if status == 200}
        if not texts:
            refused = {status for status, _, _ in answers}  # such as 405
            return PlainTextResponse("no replica has metrics\n", refused.pop() if len(refused) == 1 else 503)
        merged = merged_metrics(texts)
        return PlainTextResponse(merged, media_type="text/plain; version=0.0.4; charset=utf-8")


def prompt_of(body: bytes) -> bytes:
    """What of a request's body a prompt begins with: messages after tools, a text, or token ids; nothing of a bad one.

    Requests that agree in it up to some place have prompts that agree so far.
    """
    try:
        parsed = json.loads(body)
        prompt = parsed.get("prompt")
        if isinstance(prompt, str):
            return prompt.encode()
        if prompt is not None:
            return json.dumps(prompt).encode()
        return json.dumps([parsed.get("tools"), parsed.get("messages")], ensure_ascii=False).encode()
    except (ValueError, AttributeError, RecursionError):
        return b""


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged_metrics(texts: dict[str, str]) -> bytes:
    """Prometheus' text format, from each replica's, by name."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.samples.append(sample._replace(labels=sample.labels | {"replica": name}))
    registry = CollectorRegistry()
    registry.register(_Merged(families.values()))
    return generate_latest(registry)


def _is_stream(message: Message) -> bool:
    headers = cast("list[tuple[bytes, bytes]]", message.get("headers", ()))
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _carried(scope: Scope) -> dict[str, Any]:
    """The scope for a replica. The key and the Origin have been checked, and the Origin answered, here."""
    own = (b"origin", b"host", b"authorization")
    headers = [(name, value) for name, value in scope["headers"] if name not in own]
    return {name: scope[name] for name in CARRIED if name in scope} | {"headers": headers}


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _lifespan(receive: Receive, send: Send) -> None:
    for end in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{end}.complete"})
