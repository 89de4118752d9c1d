"""`rorqual serve --experts 2`: two processes behind the usual routes."""

import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest


@pytest.mark.slow
def test_two_processes_answer_and_end(serve):
    server = serve("--port", "0", "--no-page", "--experts", "2", "--redundant-experts", "2", "--dtype", "float32")

    def ask(i):
        body = {"prompt": "what is the sum " * (1 + i), "max_tokens": 20, "ignore_eos": True, "temperature": 0}
        schema = {"type": "json_object"} if i == 7 else None
        answer = httpx.post(server.url + "/v1/completions", json=body | {"response_format": schema}, timeout=120)
        return answer.json()["usage"]["completion_tokens"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(7))) == [20] * 7
        assert ask(7) > 0
    server.wait_for("rorqual_generation_tokens_total", lambda value: value >= 140)
    server.wait_for("rorqual_expert_balance", lambda value: 1 <= value <= 2)
    others = psutil.Process(server.process.pid).children(recursive=True)
    assert server.end(signal.SIGTERM) == 0
    _, left = psutil.wait_procs(others, 60)
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
