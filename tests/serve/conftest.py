"""A tiny reasoning model, served on a port of this machine."""

import pytest

from helpers.reasoning_model import save_reasoner
from helpers.servers import Process, Server


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """The model's directory."""
    return save_reasoner(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture
def serve(directory, tmp_path):
    """Starts `rorqual serve` processes with the options given; killed after the test."""
    running = []

    def begin(*options):
        running.append(Process(directory, tmp_path / f"log-{len(running)}", *options))
        return running[-1]

    yield begin
    for one in running:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="session")
def server(directory):
    """One server that most tests share."""
    running = Server(directory)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def small(directory):
    """A server whose KV cache holds few tokens, so that no request takes long, whatever its parameters."""
    running = Server(directory, kv_cache_bytes=1 << 14)
    assert running.service.context < 128
    yield running
    assert running.settled() == 0
    running.stop()


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def begin():
    """Starts servers of other models, and gives their URLs."""
    running = []

    def one(directory):
        running.append(Server(directory))
        return running[-1].url

    yield one
    for server in running:
        server.stop()


@pytest.fixture
def start(directory):
    """Starts servers with options of their own."""
    running = []

    def begin(directory=directory, **options):
        running.append(Server(directory, **options))
        return running[-1]

    yield begin
    for one in running:
        if one.thread.is_alive():
            one.stop()
