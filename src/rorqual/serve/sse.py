"""Server-sent events, and what to do when whoever asked has gone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import Response

Receive = Callable[[], Awaitable[Any]]
# Where many readers end a line (Python's splitlines, httpx's iter_lines) and the format does not; within JSON's texts
# they may be written so.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
READING = 10.0  # seconds for a client to read the end of an answer


class Gone(Exception):
    """The client has closed the connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The work's result; cancels it, and gives an answer nobody reads, when the client goes away meanwhile."""
    try:
        return await _race(receive, work)
    except Gone:
        return Response(status_code=499)


async def _race(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """One event for every text, which is JSON; `closed` is called in any case, once.

    The events take `seconds` at most; who has not read them READING seconds later is left alone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], seconds: float, closed: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._closed = events, seconds + READING, closed

    async def __call__(self, scope: Any, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await _race(receive, self._send(send))
        except (Gone, OSError, TimeoutError):
            pass
        finally:
            self._closed()

    async def _send(self, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            for end, written in LINE_ENDS.items():
                event = event.replace(end, written)
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
