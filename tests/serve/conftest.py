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
    """Start such processes."""
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
    running = Server(directory)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def small(directory):
    """Its cache has room for few tokens, so that nothing takes long whatever is asked for."""
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
    """Servers of other models."""
    running = []

    def one(directory):
        running.append(Server(directory))
        return running[-1].url

    yield one
    for server in running:
        server.stop()


@pytest.fixture
def start(directory):
    """Servers with settings of their own."""
    running = []

    def begin(directory=directory, **options):
        running.append(Server(directory, **options))
        return running[-1]

    yield begin
    for one in running:
        if one.thread.is_alive():
            one.stop()
