"""`rorqual serve`: a model, an address, and an end that loses nothing."""

import logging
import os
import socket
from pathlib import Path

from rorqual.engine import Engine
from rorqual.engine.recommended import recommended
from rorqual.errors import UserError
from rorqual.serve.app import build_app
from rorqual.serve.service import Options, Service

KEYS_VARIABLE = "RORQUAL_API_KEYS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line, `#` beginning a comment; else from the environment, comma-separated.

    Raises UserError for a file that is not there or holds no key.
    """
    if path is None:
        return tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise UserError(f"--api-keys {path}: {e.strerror}; give a file with one key a line") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-keys {path} holds no key; write one a line")
    return keys


def check_address(host: str, keys: tuple[str, ...], anonymous: bool) -> None:
    """Raises UserError where everybody on the network could use the model without a key."""
    if host not in LOOPBACK and not keys and not anonymous:
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
    except OSError as e:
        found.close()
        raise UserError(f"cannot listen on {host}:{port} ({e.strerror}); choose another --port or --host") from None
    found.listen(2048)
    return found


def serve(directory: Path, engine: Engine, options: Options, listening: socket.socket, page: bool) -> None:
    """Answer until SIGINT or SIGTERM; then take no more, finish what was accepted, and return."""
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    service = Service(engine, recommended(directory), options)
    app = build_app(service)
    if page and service.template:
        from rorqual.serve.page import add_page

        add_page(app, service)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(options.timeout), server_header=False
    )
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    logging.getLogger("rorqual.serve").info("%s at http://%s:%d/v1", options.name, address, port)
    uvicorn.Server(config).run(sockets=[listening])
