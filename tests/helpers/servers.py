"""Servers on a port of this machine: `Server` in a thread of this process, `Process` as a user starts it."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time

import httpx
import openai
import torch
import uvicorn

from rorqual.engine import Engine, SamplingParams
from rorqual.serve.app import build_app
from rorqual.serve.server import bind
from rorqual.serve.service import ModelService, Options


class OneThread(Engine):
    """Two threads make so small a model no faster, and wait for one another where another program has a core."""

    def submit(self, *args, **kwargs):
        torch.set_num_threads(1)  # of the calling thread
        return super().submit(*args, **kwargs)


class Server:
    """A running service: `url`, `service`, and `stop`, which ends it as SIGTERM does."""

    def __init__(
        self, directory, max_num_seqs=8, kv_cache_bytes=1 << 20, page=None, recommended=SamplingParams(), engine=None,
        **options,
    ):  # fmt: skip
        """engine: more arguments of the engine; options: of the service."""
        more = engine or {}
        engine = OneThread(
            directory, max_num_seqs=max_num_seqs, kv_cache_bytes=kv_cache_bytes, prefix_cache=True, **more
        )
        self.service = ModelService(engine, recommended, Options("tiny", **options))
        app = build_app(self.service)
        if page is not None:
            page(app, self.service)
        listening = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[listening])), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **options)

    def settled(self, seconds=20.0):
        """Wait until no request is running or waiting; the number of KV cache blocks still held."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = self.service.engine.status()
            if self.service.engine_thread.count == now.running == now.waiting == now.blocks_used == 0:
                break
            time.sleep(0.01)
        return self.service.engine.status().blocks_used

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


class Process:
    """`rorqual serve` as a user starts it: `url`, what it has logged, and `end`, which waits for its exit status."""

    def __init__(self, directory, log, *options):
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from rorqual.cli.entry import main; main()", "serve", str(directory), *options],
                stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        while not (found := re.findall(r"(http://[\d.]+:\d+)/v1", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.05)
        self.url = found[-1]
        assert httpx.get(self.url + "/health", timeout=60).status_code == 200

    def figures(self):
        """/metrics, by name."""
        lines = httpx.get(self.url + "/metrics", timeout=60).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def wait_for(self, name, fits, seconds=60.0):
        until = time.monotonic() + seconds
        while not fits(value := self.figures()[name]):
            assert time.monotonic() < until, f"{name} is still {value}"
            time.sleep(0.02)

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(60)
