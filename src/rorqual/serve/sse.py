"""Server-sent events, and cancellation when a client disconnects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
# Line ends for many readers (Python's splitlines, httpx's iter_lines) but not for the format; escaped in JSON strings.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
READ_SECONDS = 10.0  # for a client to read the end of an answer


class ClientDisconnected(Exception):
    """The client has closed the connection."""


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | Response:
    """The work's result; when the client disconnects, cancel it and return an empty response."""
    try:
        return await _race(receive, work)
    except ClientDisconnected:
        return Response(status_code=499)


async def _race(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for each in (task, disconnect):
            each.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """One event for every JSON text; `closed` is called once, in any case.

    The events take `seconds` at most; a client that has not read them READ_SECONDS seconds later is disconnected.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], seconds: float, closed: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._closed = events, seconds + READ_SECONDS, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await _race(receive, self._send(send))
        except (ClientDisconnected, OSError, TimeoutError):
            pass
        finally:
            self._closed()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            for end, written in LINE_ENDS.items():
                event = event.replace(end, written)
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
