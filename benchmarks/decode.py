"""Generation on a CPU: Rorqual, llama.cpp and transformers on the same weights, SmolLM2-135M-Instruct.

Tokens a second of one sequence, of 32 at once and of a prompt of 512 tokens, each side greedy, its sampling included;
what each number of bits costs in perplexity; and a mixture of experts against dense networks of its active and of its
total size. The weights are those of the Q4_1 file, which llama.cpp also gets requantised to Q4_0, the 4-bit format that
it repacks and is fastest with, and to Q8_0; Rorqual reads the very same files.
"""

import contextlib
import math
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from common import arguments, program, ratio_of_rounds, report, take_turns
from llama import Llama, requantise
from rorqual.engine import Engine
from rorqual.engine.score import score
from rorqual.kernels.lowbit import Packed, unpack
from rorqual.model import Transformer
from rorqual.model.gguf import import_model, smollm2_file
from rorqual.plan.cost import parameters
from rorqual.precision.lowbit import convert
from sides import MIXTURE, Ours, Transformers

PAIRS = [  # bits, our format, the peer
    ("int4", "Q4_0", "llama.cpp Q4_0"),
    ("int4", "Q4_1", "llama.cpp Q4_1"),
    ("int8", "Q8_0", "llama.cpp Q8_0"),
    ("int4", "Q4_0", "transformers bf16"),
]


class Theirs:
    """llama.cpp with a context for one long sequence and one for many short ones, which is its fastest for each."""

    def __init__(self, path: Path, threads: int) -> None:
        self.one, self.many = Llama(path, threads), Llama(path, threads, context=256, sequences=32)

    def prefill(self, prompt: list[int]) -> float:
        return self.one.prefill(prompt)

    def decode(self, prompts: list[list[int]], count: int) -> float:
        return (self.one if len(prompts) == 1 else self.many).decode(prompts, count)

    def close(self) -> None:
        self.one.close()
        self.many.close()


def memory_bandwidth() -> float:
    """Bytes a second that a sum reads from memory, the best of several."""
    numbers = torch.ones(1 << 27)
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return 4 * len(numbers) / best


def weight_bytes(model: Transformer) -> int:
    """What a step of one sequence reads of packed weights."""
    modules = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Packed)]
    tied = model.config.tie_word_embeddings
    return sum(w.data.numel() for w in modules if tied or w is not model.model.embed_tokens.weight)


def exact(model: Transformer) -> Transformer:
    """A network with the same weights that multiplies them with FP32 activations."""
    plain = Transformer(model.config)
    modules, tensors = dict(model.named_modules()), dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in tensors.items():
            owner, _, attribute = name.rpartition(".")
            value = getattr(modules[owner], attribute)
            parameter.copy_(unpack(value) if isinstance(value, Packed) else value)
    return plain.eval()


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def compare_perplexities(
    engines: dict[str, Engine], peers: dict[str, Any], windows: list[list[int]]
) -> list[list[Any]]:
    rows = []
    for name, engine in engines.items():
        plain = exact(engine.model)
        packed, unpacked, difference, size = [], [], 0.0, 0.0
        for window in windows:
            packed += score(engine.model, window, 0)[0][1:]
            unpacked += score(plain, window, 0)[0][1:]
            with torch.inference_mode():
                a, b = (m.logits(torch.tensor([window[:128]]))[0].float() for m in (engine.model, plain))
            difference, size = difference + float((a - b).square().sum()), size + float(b.square().sum())
        rows.append(
            [f"Rorqual {name}", perplexity(packed), perplexity(unpacked), 100 * math.sqrt(difference / size),
             weight_bytes(engine.model) / 1e6]
        )  # fmt: skip
    for name, peer in peers.items():
        found = [float(x) for window in windows for x in peer.one.log_probabilities(window)]
        rows.append([f"llama.cpp {name}", perplexity(found), "–", "–", "–"])
    return rows


def mixtures(quick: bool) -> tuple[dict[str, float], list[list[Any]], dict[str, Any]]:
    """A mixture of experts, a dense network of its active size and one of its total size."""
    mixture = MIXTURE
    if quick:
        mixture = MIXTURE.replace(num_hidden_layers=2, hidden_size=64, n_routed_experts=8, vocab_size=256)
    total, active = parameters(mixture)
    no_experts = {"n_routed_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None}
    width = mixture.moe_intermediate_size * (mixture.num_experts_per_tok + 1)
    wide = mixture.moe_intermediate_size * (mixture.n_routed_experts + 1)
    sides, rows = {}, []
    for name, config in (
        ("mixture", mixture),
        ("dense, active size", mixture.replace(intermediate_size=width, **no_experts)),
        ("dense, total size", mixture.replace(intermediate_size=wide, **no_experts)),
    ):
        torch.manual_seed(0)
        engine = Engine(convert(Transformer(config).eval().bfloat16(), "int4"), cache_bytes=1 << 26)
        sides[name] = (Ours(engine), *parameters(config))
    prompt = [list(range(3, 35))]
    count, rounds = (8, 1) if quick else (96, 5)
    for side, *_ in sides.values():
        side.decode(prompt, 8)
    found = take_turns({name: lambda s=side: s.decode(prompt, count) for name, (side, *_) in sides.items()}, rounds)
    for name, (_, all_of_them, used) in sides.items():
        rows.append([name, all_of_them / 1e6, used / 1e6, sorted(found[name])[rounds // 2]])
    ratios = {
        "moe-decode-b1/dense-active-size": ratio_of_rounds(found["mixture"], found["dense, active size"])["median"],
        "moe-decode-b1/dense-total-size": ratio_of_rounds(found["mixture"], found["dense, total size"])["median"],
    }
    return ratios, rows, {"parameters_total": total, "parameters_active": active, "tokens_per_second": found}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    threads = torch.get_num_threads()
    rounds, count, many = (1, 8, 8) if args.quick else (3, 96, 32)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = {"Q4_1": smollm2_file()} | {kind: folder / f"{kind}.gguf" for kind in ("Q4_0", "Q8_0")}
        for kind in ("Q4_0", "Q8_0"):
            requantise(files["Q4_1"], files[kind], kind)
        import_model("smollm2", folder / "smollm2")
        options = {"slots": 64, "cache_bytes": 1 << 28}
        engines = {kind: Engine(path, **options) for kind, path in files.items()}
        engines |= {bits: Engine(folder / "smollm2", weights=bits, dtype=torch.bfloat16, **options)
                    for bits in ("int4", "int8")}  # fmt: skip
        peers = {kind: Theirs(path, threads) for kind, path in files.items()}
        for peer in peers.values():
            stack.callback(peer.close)
        sides: dict[str, Any] = {f"Rorqual {kind}": Ours(engine) for kind, engine in engines.items()}
        sides |= {f"llama.cpp {kind}": peer for kind, peer in peers.items()}
        sides["transformers bf16"] = Transformers(folder / "smollm2")

        words = engines["Q4_1"].tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids
        prompts = [words[100 * i : 100 * i + 32] for i in range(32)]
        long = words[5000:5512]
        works = {
            "decode-b1": lambda side: side.decode(prompts[:1], count),
            "decode-b32": lambda side: side.decode(prompts, many),
            "prefill-512": lambda side: len(long) / side.prefill(long),
            "first-token-32": lambda side: 1 / side.prefill(prompts[1]),
        }
        figures: dict[str, Any] = {"tokens_per_second": {}, "threads": threads}
        ratios: dict[str, float] = {}
        rows = [[name] for name in sides]
        for work, run in works.items():
            for side in sides.values():
                run(side)
            found = take_turns({name: lambda s=side, w=run: w(s) for name, side in sides.items()}, rounds)
            figures["tokens_per_second"][work] = {name: [round(v, 1) for v in values] for name, values in found.items()}
            for row in rows:
                row.append(sorted(found[row[0]])[rounds // 2])
            for bits, ours, theirs in PAIRS:
                ratio = ratio_of_rounds(found[f"Rorqual {ours}"], found[theirs])["median"]
                ratios[f"{work}-{bits}/{theirs.lower().replace(' ', '-')}"] = ratio
        for row in rows:
            row[4] = 1000 / row[4]
        bandwidth = memory_bandwidth()
        for row in rows:
            name = row[0].removeprefix("Rorqual ")
            known = row[0].startswith("Rorqual")
            row.append(100 * weight_bytes(engines[name].model) * row[1] / bandwidth if known else "–")
        windows = [words[i : i + 512] for i in range(20_000, 20_000 + 512 * (1 if args.quick else 4), 512)]
        quality = compare_perplexities(engines, peers, windows)
        figures |= {"memory_gb_per_second": bandwidth / 1e9, "perplexity": quality}
        more, experts, details = mixtures(args.quick)
        figures["mixture"] = details
    report(
        "decode", args, ratios | more, figures,
        [
            (f"SmolLM2-135M-Instruct, {threads} threads, tokens/s (memory reads {bandwidth / 1e9:.0f} GB/s)",
             ["", "one sequence", "32 sequences", "prompt of 512", "first token of 32, ms", "% of memory speed"], rows),
            ("perplexity on Python's documentation, windows of 512 tokens",
             ["", "as computed", "with exact activations", "logits differ by %", "MB a token"], quality),
            ("mixture of experts, 4 bits, one sequence",
             ["", "M parameters", "M active", "tokens/s"], experts),
        ],
        ["torch", "llama-cpp-python", "transformers"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
