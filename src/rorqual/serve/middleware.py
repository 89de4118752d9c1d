"""ASGI middleware before every route: API keys, Host and Origin checks, CORS, and request limits."""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.api_errors import ApiError

# Paths that need a key. /health is for load balancers, and the chat page asks for a key itself.
PROTECTED = ("/v1", "/tokenize", "/detokenize", "/metrics", "/openapi.json")


PORTS = {"http": ":80", "https": ":443"}  # browsers omit them, some proxies write them
LOCAL = r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])\.?(:\d+)?"  # pages of this machine
HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]@/]+)(:\d*)?")


def is_loopback(name: str) -> bool:
    """Whether a host name or address is a loopback one."""
    name = name.lower().removesuffix(".")
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


class AuthMiddleware:
    """ASGI middleware. `keys`: one must be sent as `Authorization: Bearer …`; none: no authentication.

    Without keys, web pages of others must not use the server through a visitor's browser. So requests with an Origin
    are accepted only from pages of this server, of this machine and of `origins`; and if the server listens on loopback
    only (`host`), Host must be a name of this machine or of `origins`: any other name can be made to point here (DNS
    rebinding). CORS lets pages of this machine and of `origins` read responses.

    A request may have `max_body` bytes, and must be received within `timeout` seconds. `count` is called with the
    scope and status of every response.
    """

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], host: str, origins: tuple[str, ...], max_body: int, timeout: float,
        count: Callable[[Scope, int], None],
    ) -> None:  # fmt: skip
        self.app, self.max_body, self.timeout, self.count = app, max_body, timeout, count
        # Clients encode keys that are not ASCII in one way or the other.
        self.keys = [key.encode(code) for key in keys for code in ("utf-8", "latin-1") if _encodable(code, key)]
        names = {host.lower(), *(urlsplit(origin).hostname or "" for origin in origins)}
        self.names = names if is_loopback(host) else None  # None: any
        self.cors = CORSMiddleware(
            self._answer, allow_origins=origins, allow_origin_regex=LOCAL, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"], allow_private_network=True,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # not supported
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server omits the body
            scope = {**scope, "method": "GET"}
        status = 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_page(scope)
            await self.cors(scope, receive, counting_send)
        except ApiError as e:
            await e.response()(scope, receive, counting_send)
        finally:
            self.count(scope, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Inside CORS, so that allowed pages can read errors too."""
        begun = False

        async def tracking_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope["path"], dict(scope["headers"]))
            await self.app(scope, self._limited(receive), tracking_send)
        except ApiError as e:
            if not begun:
                await e.response()(scope, receive, send)

    def _check_page(self, scope: Scope) -> None:
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
                        403, f"Host {host}: not a name of this machine; use localhost, or start the server with "
                        f"--allow-origin http://{host}",
                    )  # fmt: skip
        if self.keys and scope["method"] != "OPTIONS":  # pages with a key are allowed
            return
        for origin in origins:
            scheme, _, name = origin.lower().partition("://")
            usual = PORTS.get(scheme, "")
            own = name and name.removesuffix(usual) in [host.lower().removesuffix(usual) for host in hosts]
            if not own and not self.cors.is_allowed_origin(origin):
                raise ApiError(
                    403, f"Origin {origin}: this web page may not use the server; to allow it, start the server with "
                    f"--allow-origin {origin}",
                )  # fmt: skip

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.keys and path.startswith(PROTECTED) and not self._is_authorized(headers.get(b"authorization", b"")):
            raise ApiError(
                401, "a valid API key is missing; send it as Authorization: Bearer KEY", code="invalid_api_key",
                WWW_Authenticate="Bearer",
            )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body:
            raise self._too_large()

    def _is_authorized(self, authorization: bytes) -> bool:
        kind, _, given = authorization.partition(b" ")
        # Every key is compared, each in constant time, so that timing reveals nothing about any of them.
        found = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return any(found) and kind.lower() == b"bearer"

    def _limited(self, receive: Receive) -> Receive:
        size, whole = 0, False
        end = asyncio.get_running_loop().time() + self.timeout

        async def limited_receive() -> Message:
            nonlocal size, whole
            if whole:  # what follows is the disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request was not received within {self.timeout:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.max_body:
                raise self._too_large()
            return message

        return limited_receive

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.max_body} bytes; shorten it")


def _encodable(code: str, text: str) -> bool:
    try:
        text.encode(code)
    except UnicodeEncodeError:
        return False
    return True
