"""Ten minutes of damaged files and requests: every verb with every file it reads, and every endpoint.

RORQUAL_FUZZ_SECONDS is how long, RORQUAL_FUZZ_SEED what is drawn (else another every time; a failure names it).
"""

import http.client
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.corruption import damaged, odd
from helpers.reasoning_model import save_reasoner
from helpers.servers import Server

SECONDS = float(os.environ.get("RORQUAL_FUZZ_SECONDS", 600))
SEED = os.environ.get("RORQUAL_FUZZ_SEED") or str(random.SystemRandom().randrange(10**6))
HARNESS = Path(__file__).with_name("harness.py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")]


def test_the_command_line():
    """No traceback, no hang, nothing deleted. One trial again: python tests/fuzz/harness.py SEED 0 TARGET@NUMBER."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, HARNESS, SEED, str(0.85 * SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])["counts"]
    assert sum(sum(found.values()) for found in counts.values()) >= len(counts)


TOOL = {"type": "function", "function": {"name": "look", "description": "x",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}  # fmt: skip
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
SAMPLED = {
    "model": "tiny", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 1, "stop": ["xyz"],
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "stream": False, "user": "me",
}  # fmt: skip
SCHEMA = {"name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
BODIES = [
    ("/v1/chat/completions", SAMPLED | {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "12"}, {"role": "user", "content": "and?"},
        ],
        "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2,
    }),
    ("/v1/chat/completions", SAMPLED | {
        "messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
    }),
    ("/v1/completions", SAMPLED | {"prompt": ["ab", "cd"], "logprobs": 2, "echo": True, "suffix": None}),
    ("/v1/completions", SAMPLED | {"prompt": [1, 2, 3], "stream": True, "best_of": 1}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}),
    ("/tokenize", {"prompt": "hi", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip
PATHS = ["/v1/models", "/health", "/metrics", "/v1/models/x", "/nothing", "//v1/models", "/v1/chat/completions?x=1"]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""]
LONG = ("max_tokens", "max_completion_tokens", "n", "best_of")


def request_of(rng):
    """(method, path, body, headers)"""
    path, body = rng.choice(BODIES)
    if rng.random() < 0.1:
        return rng.choice(METHODS), rng.choice([*PATHS, path]), json.dumps(body).encode(), {}
    body = odd(rng, body)
    if isinstance(body, dict):
        body |= {key: 2 for key in LONG if isinstance(body.get(key), int | float) and body[key] > 8}
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if rng.random() < 0.2:
        data = damaged(rng, data, len(data))
    return "POST", path, data, {"Content-Type": rng.choice(TYPES) if rng.random() < 0.2 else TYPES[0]}


def wrong_with(method, status, text, kind):
    """What is wrong with an answer; None where nothing is."""
    if status >= 500:
        return f"status {status}"
    if method == "HEAD":
        return None
    if "json" in kind:
        found = json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}"))
        if status >= 400 and not (found.get("error") or {}).get("message"):
            return f"status {status} without a message"
    if "event-stream" in kind:
        for line in text.split("\n"):
            if line.startswith("data: {"):
                found = json.loads(line[6:], parse_constant=lambda word: pytest.fail(f"bare {word}"))
                if (found.get("error") or {}).get("code") == 500:
                    return "an error in the stream"
        if "data: [DONE]" not in text and "error" not in text:
            return "a stream without an end"
    return None


def test_requests(tmp_path):
    """No 500, no answer that is not JSON, no hang; afterwards the server answers as before and holds nothing."""
    server = Server(save_reasoner(tmp_path / "tiny"))
    host, number, statuses = server.url.removeprefix("http://"), 0, {}
    until = time.monotonic() + 0.15 * SECONDS
    try:
        while time.monotonic() < until or number < 20:
            method, path, body, headers = request_of(random.Random(f"{SEED}/{number}"))
            connection = http.client.HTTPConnection(host, timeout=120)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            connection.close()
            wrong = wrong_with(method, answer.status, text, answer.headers.get("content-type", ""))
            assert not wrong, f"seed {SEED}, request {number}: {wrong}\n{method} {path} {body!r}\n{text[:2000]}"
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            number += 1
        assert server.settled() == 0
        assert server.client().models.list().data[0].id == "tiny"
        assert statuses.get(200, 0) > number / 20
        assert sum(count for status, count in statuses.items() if status >= 400) > number / 20
    finally:
        server.stop()
