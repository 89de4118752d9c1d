"""Generation on a CPU: Rorqual, llama.cpp and transformers on the same weights, SmolLM2-135M-Instruct.

Tokens a second of one sequence, of 32 at once and of a prompt of 512 tokens, each side greedy, its sampling included;
what each number of bits costs in perplexity; and a mixture of experts against dense networks of its active and of its
total size. The weights are those of the Q4_1 file, which llama.cpp also gets requantised to Q4_0, the 4-bit format that
it repacks and is fastest with, and to Q8_0; Rorqual reads the very same files. Transformers computes in FP32, and in
BF16 too where the processor has units for it.
"""

import math
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from common import arguments, dtypes, fastest, median, program, ratio_of_rounds, report, short
from rorqual.checkpoint.gguf_import import import_model, smollm2_file
from rorqual.data.tokenizer import load_tokenizer
from rorqual.plan.cost import parameters
from sides import MIXTURE
from workers import Field

FILES = ("Q4_1", "Q4_0", "Q8_0")
PAIRS = [  # bits, our format, the peer
    ("int4", "Q4_0", "llama.cpp Q4_0"),
    ("int4", "Q4_1", "llama.cpp Q4_1"),
    ("int8", "Q8_0", "llama.cpp Q8_0"),
    *(("int4", "int4", f"transformers {short(dtype)}") for dtype in dtypes()),
]
WRITER = "llama.cpp's files"


def memory_bandwidth() -> float:
    """Bytes a second that a sum reads from memory, the best of several."""
    numbers = torch.ones(1 << 27)
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return 4 * len(numbers) / best


def enter_all(field: Field, folder: Path, threads: int) -> list[str]:
    """All sides' names, of which some may be out at once."""
    files = {"Q4_1": smollm2_file()} | {kind: folder / f"{kind}.gguf" for kind in FILES[1:]}
    field.enter(WRITER, "llama:Writer")
    for kind in FILES[1:]:
        field.ask(WRITER, "write", files["Q4_1"], files[kind], kind)
    field.leave(WRITER)
    import_model("smollm2", folder / "smollm2")
    options = {"max_num_seqs": 64, "kv_cache_bytes": 1 << 28}
    present = [kind for kind, path in files.items() if path.exists()]
    names = [f"Rorqual {kind}" for kind in present]
    for kind in present:
        field.enter(f"Rorqual {kind}", "sides:Ours", files[kind], fastest(), options, ours=True)
    for bits in ("int4", "int8"):
        names.append(f"Rorqual {bits}")
        field.enter(names[-1], "sides:Ours", folder / "smollm2", fastest(), options | {"weights": bits}, ours=True)
    for kind in present if WRITER not in field.failed else []:
        names.append(f"llama.cpp {kind}")
        field.enter(names[-1], "llama:Side", files[kind], threads)
    for dtype in dtypes():
        names.append(f"transformers {short(dtype)}")
        field.enter(names[-1], "sides:Transformers", folder / "smollm2", dtype)
    return names


def qualities(field: Field, names: list[str], windows: list[list[int]]) -> list[list[Any]]:
    rows = []
    for name in names:
        if name.startswith("transformers") or (found := field.ask(name, "quality", windows)) is None:
            continue
        size = [field.ask(name, "weight_bytes") / 1e6] if name in field.ours else []
        rows.append([name, *found, *size] + ["–"] * (4 - len(found) - len(size)))
    return rows


def mixtures(field: Field, quick: bool) -> tuple[dict[str, float], list[list[Any]], dict[str, Any]]:
    """A mixture of experts, a dense network of its active size and one of its total size."""
    mixture = MIXTURE
    if quick:
        mixture = MIXTURE.replace(num_hidden_layers=2, hidden_size=64, n_routed_experts=8, vocab_size=256)
    no_experts = {"n_routed_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None}
    expert = mixture.moe_intermediate_size or 0
    width = expert * ((mixture.num_experts_per_tok or 0) + 1)
    wide = expert * ((mixture.n_routed_experts or 0) + 1)
    configs = {
        "mixture": mixture,
        "dense, active size": mixture.replace(intermediate_size=width, **no_experts),
        "dense, total size": mixture.replace(intermediate_size=wide, **no_experts),
    }
    prompt = [list(range(3, 35))]
    count, rounds = (8, 1) if quick else (96, 5)
    for name, config in configs.items():
        field.enter(name, "sides:OursAtRandom", config, fastest(), {"kv_cache_bytes": 1 << 26}, ours=True)
        field.ask(name, "decode", prompt, 8)
    found = field.turns(configs, "decode", (prompt, count), rounds)
    rows = [[name, *(n / 1e6 for n in parameters(config)), median(found, name)] for name, config in configs.items()]
    ratios = {
        f"moe-decode-b1/{name.replace(', ', '-').replace(' ', '-')}":
            ratio_of_rounds(found["mixture"], found[name])["median"]
        for name in configs if name != "mixture" and {"mixture", name} <= found.keys()
    }  # fmt: skip
    total, active = parameters(mixture)
    return ratios, rows, {"parameters_total": total, "parameters_active": active, "tokens_per_second": found}


def main() -> None:
    args = arguments(__doc__, turn=120, whole=900)
    threads = torch.get_num_threads()
    rounds, count, many = (1, 8, 8) if args.quick else (3, 96, 32)
    sequences, width = (4, 128) if args.quick else (32, 512)
    with tempfile.TemporaryDirectory() as name, Field(args.turn_limit, args.limit) as field:
        folder = Path(name)
        names = enter_all(field, folder, threads)
        tokenizer = load_tokenizer(folder / "smollm2")
        words = tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids
        prompts = [words[100 * i : 100 * i + 32] for i in range(sequences)]
        long = words[5000 : 5000 + width]
        # What is asked, and its result turned into something of which more is better.
        works = {
            "decode-b1": ("decode", (prompts[:1], count), lambda speed: speed),
            "decode-b32": ("decode", (prompts, many), lambda speed: speed),
            "prefill-512": ("prefill", (long,), lambda seconds: len(long) / seconds),
            "first-token-32": ("prefill", (prompts[1],), lambda seconds: 1 / seconds),
        }
        figures: dict[str, Any] = {"tokens_per_second": {}, "threads": threads}
        ratios: dict[str, float] = {}
        rows: list[list[Any]] = [[name] for name in names]
        for work, (method, what, better) in works.items():
            for name in names:
                field.ask(name, method, *what)  # warm
            found = field.turns(names, method, what, rounds)
            found = {name: [better(value) for value in values] for name, values in found.items()}
            figures["tokens_per_second"][work] = {name: [round(v, 1) for v in values] for name, values in found.items()}
            for row in rows:
                row.append(median(found, row[0]))
            for bits, ours, theirs in PAIRS:
                if {f"Rorqual {ours}", theirs} <= found.keys():
                    ratio = ratio_of_rounds(found[f"Rorqual {ours}"], found[theirs])["median"]
                    ratios[f"{work}-{bits}/{theirs.lower().replace(' ', '-')}"] = ratio
        bandwidth = memory_bandwidth()
        for row in rows:
            row[4] = row[4] if row[4] == "–" else 1000 / row[4]
            read = field.ask(row[0], "weight_bytes") if row[0] in field.ours else None
            row.append("–" if read is None or row[1] == "–" else 100 * read * row[1] / bandwidth)
        windows = [words[i : i + width] for i in range(20_000, 20_000 + width * (1 if args.quick else 4), width)]
        quality = qualities(field, names, windows)
        for name in names:
            field.leave(name)
        figures |= {"memory_gb_per_second": bandwidth / 1e9, "perplexity": quality}
        more, experts, details = mixtures(field, args.quick)
        figures["mixture"] = details
    report(
        "decode", args, ratios | more, figures,
        [
            (f"SmolLM2-135M-Instruct, {threads} threads, tokens/s (memory reads {bandwidth / 1e9:.0f} GB/s)",
             ["", "one sequence", f"{sequences} sequences", f"prompt of {width}", "first token of 32, ms",
              "% of memory speed"], rows),
            (f"perplexity on Python's documentation, windows of {width} tokens",
             ["", "as computed", "with exact activations", "logits differ by %", "MB a token"], quality),
            ("mixture of experts, 4 bits, one sequence",
             ["", "M parameters", "M active", "tokens/s"], experts),
        ],
        ["torch", "llama-cpp-python", "transformers"], field.failed, field.ours,
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
