"""Run the server: API keys, the address, and graceful shutdown."""

import gc
import logging
import math
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.extras import require
from rorqual.files import read_text
from rorqual.serve.app import build_app
from rorqual.serve.middleware import PORTS, is_loopback
from rorqual.serve.service import ModelService, Options
from rorqual.serve.sse import READ_SECONDS

KEYS_VARIABLE = "RORQUAL_API_KEYS"
# Seconds that a connection may be idle. Clients built on httpx, OpenAI's among them, close theirs after 5: a server
# that closed at the same moment would lose the request being sent.
KEEP_ALIVE = 75

log = logging.getLogger("rorqual.serve")


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys from a file, one a line, with `#` comments; else from the environment, comma-separated or one a line.

    Raises UserError for a missing file, one without keys, and a key that no header can carry.
    """
    if path is None:
        name, text = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "")
        lines = text.replace(",", "\n").split("\n")
    else:
        name = f"--api-keys {path}"
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise UserError(f"{name} does not exist; give a file with one key a line") from None
        except UserError as e:  # its message begins with the path
            raise UserError(f"--api-keys {e}") from None
        lines = ["" if line.strip().startswith("#") else line for line in text.split("\n")]
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        # The message does not quote the key: keys are secret.
        if not key.isprintable() or re.search(r"\s#", key):
            raise UserError(
                f"{name}: key {number} holds a comment or a control character; write only the key on a line"
            )
        if key:
            keys.append(key)
    if text and not keys:
        raise UserError(f"{name} holds no key; write one a line")
    return tuple(keys)


def check_address(host: str, keys: tuple[str, ...], anonymous: bool) -> None:
    """Raises UserError for an address open to the network without API keys."""
    if not is_loopback(host) and not keys and not anonymous:
        raise UserError(
            f"--host {host} is open to the network, and there is no API key; give --api-keys FILE or set "
            f"{KEYS_VARIABLE}, or allow it with --anonymous"
        )


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them. Raises UserError for an invalid one."""
    found = []
    for origin in origins:
        name = origin.strip().lower().rstrip("/")
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*@]+", name):
            raise UserError(f"--allow-origin {origin}: give scheme://host, with :port where a browser shows one")
        found.append(name.removesuffix(PORTS.get(name.partition("://")[0], "")))
    return tuple(found)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError, ValueError) as e:
        found.close()
        why = getattr(e, "strerror", None) or (
            "a port is from 0 to 65535" if isinstance(e, OverflowError) else "not an address"
        )
        raise UserError(f"cannot listen on {host}:{port} ({why}); choose another --port or --host") from None
    found.listen(2048)
    return found


def serve(
    default_params: SamplingParams, engine: Engine, options: Options, listening: socket.socket, page: bool
) -> None:
    """Serve until SIGINT or SIGTERM; then accept no more requests, finish those accepted, and return.

    default_params: sampling parameters where a request gives none. Raises UserError if the KV cache is too small.
    """
    _log_to_stderr()
    service = ModelService(engine, default_params, options)
    engine.prepare()
    app = build_app(service)
    if page and service.template:
        from rorqual.serve.chat_page import add_page

        add_page(app, service)
    _run(app, options, listening, f"context of {service.context} tokens", app.state.leaving)


def serve_replicas(
    model: Path, count: int, arguments: dict[str, Any], default_params: SamplingParams, options: Options,
    listening: socket.socket,
) -> None:  # fmt: skip
    """As `serve`, with `count` engines on Ray Serve. arguments: Engine's. Raises UserError where they don't start."""
    require("cluster", "ray")
    from rorqual.serve.front import build_front
    from rorqual.serve.replicas import replicas

    _log_to_stderr()
    with replicas(model, count, arguments, default_params, options) as handle:
        _run(build_front(handle, count, options), options, listening, f"{count} replicas", [])


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _run(
    app: ASGIApp, options: Options, listening: socket.socket, what: str, leaving: list[Callable[[], None]]
) -> None:
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    log.info("%s at http://%s:%d/v1, %s", options.name, address, port, what)
    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(options.timeout + 2 * READ_SECONDS),
        ),
        leaving,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn re-raises them on exit: not status 0
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    # The garbage collector skips frozen objects: traversing the libraries' million objects took a sixth of the event
    # loop's time, and delayed the engine.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listening])
    log.info("every request is answered; exiting")


class Server(uvicorn.Server):
    """Shutdown does not wait for open chat pages, which `leaving` closes."""

    def __init__(self, config: uvicorn.Config, leaving: list[Callable[[], None]]) -> None:
        super().__init__(config)
        self._leaving = leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("no more requests are accepted; finishing running ones")
        for leave in self._leaving:
            leave()
        await super().shutdown(sockets)
