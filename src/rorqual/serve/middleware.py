"""What stands before every route: who may ask, from which pages, and how large a request may be."""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from rorqual.serve.api_errors import ApiError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
# What needs a key. Open are /health, which a load balancer asks, and the page, which asks for a key itself.
CLOSED = ("/v1", "/tokenize", "/detokenize", "/metrics", "/openapi.json")


PORTS = {"http": ":80", "https": ":443"}  # which a browser leaves out, and some proxies write
LOCAL = r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])\.?(:\d+)?"  # pages of this machine
HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]@/]+)(:\d*)?")


def is_loopback(name: str) -> bool:
    """Whether it is this machine as only itself reaches it."""
    name = name.lower().removesuffix(".")
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


class AuthMiddleware:
    """ASGI middleware. `keys`: of these one must come as `Authorization: Bearer …`; none: everybody may ask.

    A browser brings other people's pages along, which must not use a server that wants no key. So without keys, what a
    page asks (it has an Origin) is answered only for pages of this server, of this machine and of `origins`; and where
    only this machine reaches the server (`host`), it must be asked by a name of this machine's or of `origins`: any
    other name can be made to point here (DNS rebinding). Browsers are told (CORS) that pages of this machine and of
    `origins` may read the answers.

    A request may have `max_body` bytes, and must have come to its end after `timeout` seconds.
    """

    def __init__(
        self, app: Any, keys: tuple[str, ...], host: str, origins: tuple[str, ...], max_body: int, timeout: float,
        counted: Any,
    ) -> None:  # fmt: skip
        self.app, self.max_body, self.timeout, self.counted = app, max_body, timeout, counted
        # Clients send what is not ASCII in the one way or the other.
        self.keys = [key.encode(code) for key in keys for code in ("utf-8", "latin-1") if _has(code, key)]
        names = {host.lower(), *(urlsplit(origin).hostname or "" for origin in origins)}
        self.names = names if is_loopback(host) else None  # None: any
        self.cors = CORSMiddleware(
            self._answer, allow_origins=origins, allow_origin_regex=LOCAL, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"], allow_private_network=True,
        )  # fmt: skip

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # which nothing here speaks
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # GET, whose body the server then leaves out
            scope = scope | {"method": "GET"}
        status = 0

        async def sending(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_page(scope)
            await self.cors(scope, receive, sending)
        except ApiError as e:
            await e.response()(scope, receive, sending)
        finally:
            self.counted(scope, status)

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Whoever asks may; and a page that does may read also what is wrong."""
        begun = False

        async def sending(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope["path"], dict(scope["headers"]))
            await self.app(scope, self._limited(receive), sending)
        except ApiError as e:
            if not begun:
                await e.response()(scope, receive, send)

    def _check_page(self, scope: dict[str, Any]) -> None:
        hosts, origins = (
            [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        if not self.keys and self.names is not None:
            for host in hosts:
                found = HOST.fullmatch(host)
                name = found["name"].lower() if found else ""
                if not is_loopback(name) and name.removesuffix(".") not in self.names:
                    raise ApiError(
                        403, f"Host {host}: no name of this machine's; ask at localhost, or start the server with "
                        f"--allow-origin http://{host}",
                    )  # fmt: skip
        if self.keys and scope["method"] != "OPTIONS":  # a page that has a key may ask
            return
        for origin in origins:
            scheme, _, name = origin.lower().partition("://")
            usual = PORTS.get(scheme, "")
            own = name and name.removesuffix(usual) in [host.lower().removesuffix(usual) for host in hosts]
            if not own and not self.cors.is_allowed_origin(origin):
                raise ApiError(
                    403, f"Origin {origin}: pages of others may not use this server; start it with --allow-origin "
                    f"{origin} if they shall",
                )  # fmt: skip

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


def _has(code: str, text: str) -> bool:
    try:
        text.encode(code)
    except UnicodeEncodeError:
        return False
    return True
