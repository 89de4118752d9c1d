"""benchmarks/serving.py: the client counts right, servers stand still, and our server can be measured."""

import asyncio
import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from helpers.small_configs import GROUPED
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import save_tokenizer, train_tokenizer
from rorqual.model import Transformer
from rorqual.recipe import TokenizerSection

FOLDER = Path(__file__).parents[2] / "benchmarks"
DOOR = """
import http.server, os, sys, time
class Door(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
"""
OPEN = """
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Door).serve_forever()
"""


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def load(module):
    return module("load")


@pytest.fixture
def servers(module):
    return module("servers")


def answered(load, pieces, ask=None):
    """What the light client makes of a server that answers in these pieces."""
    ask = ask or load.Ask("say", 2)

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def both():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await load.light(server.sockets[0].getsockname()[1], ask)

    return asyncio.run(both())


OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'


def test_events_with_text_are_counted_wherever_they_are_cut(load):
    texts = b'data: {"choices":[{"text":" a"}]}\n\n' + b'data: {"choices": [{"text": "\\""}]}\n\n'
    empty = b'data: {"choices":[{"text":"","finish_reason":"length"}],"usage":null}\n\n'
    whole = texts + empty + USAGE + b"data: [DONE]\n\n"
    for at in range(1, len(whole), 7):
        answer = answered(load, [OK, whole[:at], whole[at:]])
        assert (len(answer.times), answer.prompt, answer.made) == (2, 3, 2)
        assert answer.start < answer.times[0] <= answer.times[1]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b'{"error": "busy"}'], "busy"),
        ([OK, b'data: {"choices":[{"text":" a"}]}\n\n'], "broke off"),
        ([OK, USAGE], "0 events"),
    ],
)
def test_an_answer_that_is_none_is_an_error(load, pieces, said):
    with pytest.raises(RuntimeError, match=said):
        answered(load, pieces)


def test_answers_of_another_length_are_not_compared(load):
    with pytest.raises(RuntimeError, match="5 tokens were asked for, 2 came"):
        answered(load, [OK, b'data: {"choices":[{"text":" a"}]}\n\n', USAGE], load.Ask("say", 5))


def test_requests_are_the_same_for_everybody_and_within_bounds(load):
    first = load.asks(200, "a")
    assert first == load.asks(200, "a") != load.asks(200, "b")
    assert max(len(a.prompt.split()) for a in load.asks(200, "c", 20)) == 15
    many = load.asks(4000, "a")
    words, tokens = [len(a.prompt.split()) for a in many], [a.tokens for a in many]
    assert min(words) >= 3
    assert min(tokens) >= 4
    assert max(words) == 770
    assert max(tokens) == 1024
    # ShareGPT's averages, in SmolLM2's tokens.
    assert abs(1.33 * sum(words) / len(words) - 215) < 12
    assert abs(sum(tokens) / len(tokens) - 198) < 12


def test_closed_loop_keeps_so_many_under_way(load):
    under_way, seen, most = 0, [], 0

    async def send(port, ask):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(ask.tokens):
            await asyncio.sleep(0)
        under_way -= 1
        seen.append(ask)
        return load.Answer(0.0)

    wanted = [load.Ask(str(i), i % 5) for i in range(20)]
    found = asyncio.run(load.closed_loop(0, wanted, 3, send))
    assert (most, len(found)) == (3, 20)
    assert sorted(seen, key=lambda a: int(a.prompt)) == wanted


def test_requests_come_by_chance_at_the_rate(load, monkeypatch):
    now, waits = [0.0], []

    async def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(load.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(load.asyncio, "sleep", sleep)

    async def send(port, ask):
        return load.Answer(now[0])

    found = asyncio.run(load.poisson(0, [load.Ask("", 1)] * 400, 5.0, "seed", send))
    assert len(found) == 400
    assert now[0] / 400 == pytest.approx(1 / 5, rel=0.15)
    assert sum(w > 1 / 5 for w in waits) / 400 == pytest.approx(2.718**-1, abs=0.08)  # of an exponential distribution


def test_summary(load):
    one, two = load.Answer(0.0, [1.0, 1.5, 2.0], 4, 3), load.Answer(1.0, [4.0, 5.0], 2, 2)
    found = load.summary([one, two])
    assert (found["tokens_per_second"], found["requests_per_second"]) == (1.0, 0.4)
    assert (found["ttft_ms_p50"], found["itl_ms_p50"], found["prompt_tokens"]) == (2000, 500, 6)
    assert found["tpot_ms_p50"] == (500 + 1000) / 2


def test_events_may_bring_several_tokens(load):
    found = load.summary([load.Answer(0.0, [1.0, 2.0, 4.0], 4, 9), load.Answer(2.0, [5.0], 2, 1)])
    assert found["busy_tokens_per_second"] == 3, "two events of three tokens each until the last request"
    assert found["tpot_ms_p95"] == pytest.approx(0.95 * 3000 / 8)


def test_a_server_comes_up_and_ends(servers):
    with servers.Server(servers.Contestant("door", "plain", (sys.executable, "-c", DOOR + OPEN))) as server:
        process = psutil.Process(server._process.pid)
        assert process.is_running()
    assert not process.is_running()


def test_a_server_that_does_not_come_up_says_why(servers):
    with pytest.raises(RuntimeError, match="ValueError: no such model"):
        servers.Server(servers.Contestant("door", "shut", (sys.executable, "-c", "raise ValueError('no such model')")))


def test_a_server_that_dies_or_crawls_is_out(module, servers, load, monkeypatch):
    serving = module("serving")
    monkeypatch.setattr(serving, "REST", 0)
    ways = {"dies": "os.kill(os.getpid(), 11)", "crawls": "time.sleep(60)"}
    contestants = [
        servers.Contestant("door", name, (sys.executable, "-c", DOOR + f"Door.do_POST = lambda self: {way}\n" + OPEN))
        for name, way in ways.items()
    ]
    failed = {}
    with contextlib.ExitStack() as stack:
        field = serving.Field(contestants, stack, {}, 300, failed)
        field.limit = 0.5
        for contestant in contestants:
            assert field.measure(contestant, lambda port: load.closed_loop(port, load.asks(1, "few", 16), 1)) is None
        assert field.best("c1") == {}
    assert failed == {"door dies": "crashed: SIGSEGV", "door crawls": "over 0.5 s"}


def test_a_peer_that_cannot_be_made_takes_nobody_along(module, monkeypatch, tmp_path):
    serving, failed = module("serving"), {}

    def vllm(*_):
        raise subprocess.CalledProcessError(1, ["pip", "install", "vllm"])

    made = [module("servers").Contestant("llama.cpp", "Q4_0", ())]
    monkeypatch.setattr(serving, "PEERS", {"vllm": vllm, "llama.cpp": lambda *_: made})
    assert serving.theirs(["vllm", "llama.cpp"], tmp_path, 1, failed) == made
    assert failed["vllm"].startswith("could not be made: Command")


def test_ratios_are_above_one_where_we_are_better(module):
    def side(speed, ttft):
        each = {"tokens_per_second": speed, "ttft_ms_p50": ttft, "tpot_ms_p50": 1.0}
        return each | {"format": "f", "rounds": [each]}

    loads = {"c8": {"rorqual": side(30.0, 5.0), "peer": side(10.0, 20.0)}}
    loads["poisson"] = {"rorqual": side(1.0, 1.0), "peer": side(1.0, 3.0)}
    ratios, pairs = module("serving").ratios_of(loads)
    assert ratios == {
        "serving-c8/peer": 3, "serving-c8-ttft/peer": 4, "serving-c8-tpot/peer": 1,
        "serving-poisson-ttft/peer": 3, "serving-poisson-tpot/peer": 1,
    }  # fmt: skip
    assert pairs["serving-c8/peer"]["median"] == 3


def test_the_fastest_of_each_side_goes_on(module, servers):
    serving = module("serving")
    field = object.__new__(serving.Field)
    names = {"slow": (5.0, False), "quick": (9.0, False), "guesses": (12.0, True)}
    field.tries = {
        servers.Contestant("a", name, (), guesses=guesses): {"c8": {"tokens_per_second": speed}}
        for name, (speed, guesses) in names.items()
    } | {servers.Contestant("b", "only", ()): {}}
    assert {side: c.format for side, c in field.best("c8").items()} == {"a": "guesses", "b": "only"}
    assert {side: c.format for side, c in field.best("c8", guesses=False).items()} == {"a": "quick", "b": "only"}


def test_our_server_is_measured(module, servers, load, tmp_path):
    serving = module("serving")
    tokenizer = train_tokenizer(["in the year of the air train"], TokenizerSection(vocab_size=270, special_tokens=[]))
    config = GROUPED.replace(vocab_size=len(tokenizer), max_position_embeddings=4096)
    torch.manual_seed(0)
    save_model(Transformer(config), tmp_path / "tiny", tokenizer)
    save_tokenizer(tokenizer, tmp_path / "tiny")
    contestant = servers.Contestant(
        "rorqual", "float32",
        (Path(sys.executable).parent / "rorqual", "serve", tmp_path / "tiny", "--name", load.MODEL, "--no-page"),
    )  # fmt: skip
    with servers.Server(contestant) as server:
        wanted = load.asks(6, "few", 16)
        found = serving.measure(server, lambda port: load.closed_loop(port, wanted, 3))
    assert found["answer_tokens"] == sum(a.tokens for a in wanted)
    assert found["prompt_tokens"] == sum(len(tokenizer(a.prompt).input_ids) for a in wanted)
    assert found["tokens_per_second"] > 0
    assert 0 < found["ttft_ms_p50"] <= found["ttft_ms_p95"]
    assert 0 < found["events_per_token"] <= 1


@pytest.mark.slow
def test_quick_run_measures_our_formats(module):
    command = [sys.executable, str(FOLDER / "serving.py"), "--quick", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert set(found["figures"]["loads"]) == {"c1", "c1-plain", "c8", "c8-plain", "poisson", "c8-openai"}
    formats = [f"{weights}, cache int8{guess}" for weights in ("int4", "int8") for guess in ("", ", look-up")]
    common = module("common")
    formats.append(common.short(common.fastest()))
    assert set(found["figures"]["tried_tokens_per_second"]) == {f"rorqual {f}" for f in formats}
    for load in found["figures"]["loads"].values():
        assert load["rorqual"]["tokens_per_second"] > 0
