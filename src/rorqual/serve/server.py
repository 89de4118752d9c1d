"""`rorqual serve`: a model, an address, and an end that loses nothing."""

import gc
import logging
import math
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.files import read_text
from rorqual.serve.app import build_app
from rorqual.serve.middleware import PORTS, is_loopback
from rorqual.serve.service import ModelService, Options
from rorqual.serve.sse import READING

KEYS_VARIABLE = "RORQUAL_API_KEYS"
# Seconds that a connection may idle. Clients built on httpx, OpenAI's among them, drop theirs after 5: a server that
# closed at the same moment would lose the request just being sent.
KEEP_ALIVE = 75
SHORTEST = 64  # tokens that a prompt and its answer must have room for

log = logging.getLogger("rorqual.serve")


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line, `#` beginning a comment; else from the environment, comma-separated or one a line.

    Raises UserError for a file that is not there or holds no key, and for what no header can carry.
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
        except UserError as e:  # which begins with the path
            raise UserError(f"--api-keys {e}") from None
        lines = ["" if line.strip().startswith("#") else line for line in text.split("\n")]
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        # What follows is never said: keys are secret.
        if not key.isprintable() or re.search(r"\s#", key):
            raise UserError(f"{name}: key {number} holds a comment or a control character; write keys alone on a line")
        if key:
            keys.append(key)
    if text and not keys:
        raise UserError(f"{name} holds no key; write one a line")
    return tuple(keys)


def check_address(host: str, keys: tuple[str, ...], anonymous: bool) -> None:
    """Raises UserError where everybody on the network could use the model without a key."""
    if not is_loopback(host) and not keys and not anonymous:
        raise UserError(
            f"--host {host} is open to the network, and there is no API key; give --api-keys FILE or set "
            f"{KEYS_VARIABLE}, or say --anonymous"
        )


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """As a browser says them. Raises UserError for what is no origin."""
    found = []
    for origin in origins:
        said = origin.strip().lower().rstrip("/")
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*@]+", said):
            raise UserError(f"--allow-origin {origin}: give scheme://host, with :port where a browser shows one")
        found.append(said.removesuffix(PORTS.get(said.partition("://")[0], "")))
    return tuple(found)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError, ValueError) as e:
        found.close()
        why = getattr(e, "strerror", None) or (
            "a port is from 0 to 65535" if isinstance(e, OverflowError) else "this is no address"
        )
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
    service = ModelService(engine, recommended, options)
    if service.context < SHORTEST:
        raise UserError(
            f"the cache of {engine.kv_cache_bytes} bytes holds {service.context} tokens of a conversation; "
            f"raise --kv-cache-gb until it holds at least {SHORTEST}"
        )
    engine.prepare()
    app = build_app(service)
    if page and service.template:
        from rorqual.serve.chat_page import add_page

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
