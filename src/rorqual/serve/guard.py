"""What stands before every route: who may ask, and how large a request may be."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from rorqual.serve.errors import ApiError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
# What needs a key. Open are /health, which a load balancer asks, and the page, which asks for a key itself.
CLOSED = ("/v1", "/tokenize", "/detokenize", "/metrics", "/openapi.json")


class Guard:
    """ASGI middleware. `keys`: of these one must come as `Authorization: Bearer …`; none: everybody may ask.

    A request may have `max_body` bytes, and must have come to its end after `timeout` seconds.
    """

    def __init__(self, app: Any, keys: tuple[str, ...], max_body: int, timeout: float, counted: Any) -> None:
        self.app, self.max_body, self.timeout, self.counted = app, max_body, timeout, counted
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        status = 0

        async def sending(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self.app(scope, self._limited(receive), sending)
        except ApiError as e:
            if status == 0:
                await e.response()(scope, receive, sending)
        finally:
            self.counted(scope, status)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.keys and path.startswith(CLOSED) and not self._knows(headers.get(b"authorization", b"")):
            raise ApiError(
                401, "a valid API key is missing; send it as Authorization: Bearer KEY", code="invalid_api_key",
                WWW_Authenticate="Bearer",
            )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body:
            raise self._too_large()

    def _knows(self, authorization: bytes) -> bool:
        kind, _, given = authorization.partition(b" ")
        # Every key is compared, each in constant time, so that time says nothing about any of them.
        found = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return any(found) and kind.lower() == b"bearer"

    def _limited(self, receive: Receive) -> Receive:
        size, whole = 0, False
        end = asyncio.get_running_loop().time() + self.timeout

        async def receiving() -> dict[str, Any]:
            nonlocal size, whole
            if whole:  # what still comes is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request did not come to its end in {self.timeout:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.max_body:
                raise self._too_large()
            return message

        return receiving

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.max_body} bytes; shorten it")
