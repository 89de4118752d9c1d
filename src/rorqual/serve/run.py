"""`rorqual serve`: a model, an address, and an end that loses nothing."""

import gc
import ipaddress
import logging
import math
import os
import signal
import socket
from pathlib import Path

import uvicorn

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.serve.app import build_app
from rorqual.serve.service import Options, Service
from rorqual.serve.sse import READING

KEYS_VARIABLE = "RORQUAL_API_KEYS"
# Seconds that a connection may idle. Clients built on httpx, OpenAI's among them, drop theirs after 5: a server that
# closed at the same moment would lose the request just being sent.
KEEP_ALIVE = 75
SHORTEST = 64  # tokens that a prompt and its answer must have room for

log = logging.getLogger("rorqual.serve")


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line, `#` beginning a comment; else from the environment, comma-separated.

    Raises UserError for a file that is not there or holds no key.
    """
    if path is None:
        return tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", "it is not text")
        raise UserError(f"--api-keys {path}: {why}; give a file with one key a line") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-keys {path} holds no key; write one a line")
    return keys


def check_address(host: str, keys: tuple[str, ...], anonymous: bool) -> None:
    """Raises UserError where everybody on the network could use the model without a key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        loopback = False
    if not loopback and not keys and not anonymous:
        raise UserError(
            f"--host {host} is open to the network, and there is no API key; give --api-keys FILE or set "
            f"{KEYS_VARIABLE}, or say --anonymous"
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as e:
        found.close()
        why = getattr(e, "strerror", "a port is from 0 to 65535")
        raise UserError(f"cannot listen on {host}:{port} ({why}); choose another --port or --host") from None
    found.listen(2048)
    return found


def serve(recommended: SamplingParams, engine: Engine, options: Options, listening: socket.socket, page: bool) -> None:
    """Answer until SIGINT or SIGTERM; then take no more, finish what was accepted, and return. recommended: how to
    sample where a request does not say.

    Raises UserError where the cache has no room for a conversation.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("uvicorn.error", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    service = Service(engine, recommended, options)
    if service.context < SHORTEST:
        raise UserError(
            f"the cache of {engine.cache_bytes} bytes holds {service.context} tokens of a conversation; "
            f"raise --cache-gb until it holds at least {SHORTEST}"
        )
    engine.prepare()
    app = build_app(service)
    if page and service.template:
        from rorqual.serve.page import add_page

        add_page(app, service)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    log.info("%s at http://%s:%d/v1, context of %d tokens", options.name, address, port, service.context)
    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(options.timeout + 2 * READING),
        )
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end, which would not be 0
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    # What is there now stays: a collector that went through the libraries' million objects again and again took a sixth
    # of the loop's time, and kept the engine waiting.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listening])
    log.info("every request is answered; the end")


class Server(uvicorn.Server):
    """Its end does not wait for those who only look at the page."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("no more requests are taken; finishing those that run")
        for leave in self.config.app.state.leaving:
            leave()
        await super().shutdown(sockets)
