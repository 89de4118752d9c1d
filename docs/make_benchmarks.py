"""Writes docs/benchmarks.md, and the speed tables of README.md and README.fr.md, from benchmarks/results/*.json.

python docs/make_benchmarks.py            # after `make bench`; tests/docs fails while they differ
"""

import json
from pathlib import Path
from typing import Any

import benchmark_tables
import rl_benchmark_tables
from benchmark_tables import DASH, ratios, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

# Processor classes, as the names of result files have them, in the order of the tables.
CLASSES = {
    "zen5-avx512": "AMD EPYC, Zen 5 (AVX-512)",
    "zen4-avx512": "AMD EPYC, Zen 4 (AVX-512)",
    "emeraldrapids-amx": "Intel Xeon, Emerald Rapids (AVX-512 and AMX)",
    "emeraldrapids-avx512": "Intel Xeon, Emerald Rapids (AVX-512, AMX off)",
    "epyc-avx512": "AMD EPYC (AVX-512 BF16)",
    "zen3-avx2": "AMD EPYC, Zen 3 (AVX2 only)",
    "nvidia-h200": "NVIDIA H200",
}

FIGURES = benchmark_tables.FIGURES | rl_benchmark_tables.FIGURES
UNCOMPARED = (  # without a peer
    "fp8_loss", "fp8_memory", "kernels", "kv_drift", "planner_memory", "r1", "revision", "rl_bias", "rounded_rollouts",
    "student",
)  # fmt: skip

# Benchmark → what it compares.
BENCHMARKS = {
    "train": (
        "Pre-training of a DeepSeek-V3-style network of 15 M parameters (hidden 256, 6 layers, 16 experts of 176,"
        " 4 active, vocabulary 4096), 8×256 tokens a step, against transformers' `DeepseekV3ForCausalLM` with "
        "fused AdamW; in turns of eight steps, median of the rounds."
    ),
    "rl_step": (
        "One GRPO step on SmolLM2-135M-Instruct, 64 completions of up to 64 tokens, same prompts and reward, "
        "against TRL's `GRPOTrainer`."
    ),
    "rollout": (
        "The speedrun's RL steps (256 completions a step) with the current engine and with the one before the "
        "paged KV cache; 30 steps in turn. Ratios are old time over new time."
    ),
    "planner_rl": (
        "Seconds of RL steps, predicted (`rorqual plan --calibrate`, and a rehearsal of six steps) and measured in "
        "the next eight: SmolLM2-135M with 64 answers a step, the speedrun's mixture of experts with a reference model "
        "and two updates, a dense model of 5 M parameters whose rollouts are in FP8. Ratios are rehearsed over "
        "measured."
    ),
    "balance": (
        "Expert balancing on 1.2 M tokens of English, 16 experts of which 4 are active: DeepSeek-V3's correction "
        "bias against the auxiliary loss, no balancing, and a dense model of equal FLOPs. `max-vio` and "
        "`bits-per-byte` ratios are the other's value over the bias's. ± is the deviation over the seeds."
    ),
    "decode": (
        "Generation with SmolLM2-135M-Instruct, the same files on both sides, greedy, sampling included; medians "
        "of three rounds in turn. The mixture of experts has 322 M parameters, 82 M active (V3's layout, 4 bits, "
        "random weights). Perplexity: Python's documentation, windows of 512 tokens; *exact* is the same weights "
        "with FP32 activations."
    ),
    "classes": (
        "Ratios to the peer for each class of processor that the machine has or can lower itself to: Rorqual's "
        "kernels, PyTorch, oneDNN, MKL and llama.cpp are all limited to the class."
    ),
    "kernels": (
        "Each kernel at each level that the machine runs, on two threads; `none` is PyTorch without the compiled "
        "kernels. Bytes and operations are what must be done once (an integer product's count too); the roofs are "
        "measured: summing 1 GiB, and PyTorch's FP32 product of 2048 × 2048 matrices. *Of the roof*: the time that "
        "bytes or operations need there, whichever is longer, by the time taken; over 1 where integers are faster "
        "than FP32, or caches than memory."
    ),
    "speculate": (
        "Speculative decoding of one sequence, by the multi-token module (mtp) and by prompt lookup (ngram). The "
        "speedrun's model has 8-bit weights and temperature 1, SmolLM2 4-bit weights and greedy decoding."
    ),
    "serving": (
        "Streamed completions of SmolLM2-135M-Instruct over HTTP, the client on the same two cores, each side in "
        "the fastest of the formats tried (vLLM in an environment of its own, `benchmarks/peers.py`). Prompts "
        "have 142 tokens and outputs 87 on average, on Zen 5 215 and 198. `cN`: N clients in a closed loop; "
        "`-plain`: speculative decoding off on all sides; `-sampled`: temperature 0.6, top-p 0.95, else greedy; "
        "`poisson`: Poisson arrivals at 0.7 of what the slowest side sustains; `-openai`: clients with the openai"
        " package. TTFT: time to first token. TPOT: time per output token after the first event. ITL: time "
        "between events. The Zen 3 results are of a `--quick` run (prompts and outputs of up to 128 tokens, one "
        "turn of each kind), which scatters."
    ),
    "fp8_loss": (
        "The loss of a V3-style model of 17 M parameters trained in V3's FP8, in FP8 with one scale a tensor and in "
        "MXFP8, against FP32 or BF16: the same batches, mean of the last 200 of 2000 steps of 1024 tokens, with a 95 % "
        "interval (Student's t) over the seeds. *control*: the baseline from weights that differ by one part in a "
        "million, which is how far chaos alone carries a run. Every loss is kept in `benchmarks/results/`."
    ),
    "fp8_memory": (
        "Memory and time of a training step of fp8_loss's model, measured: bytes a parameter of weights, masters, "
        "gradients and moments; bytes a token that a forward pass leaves allocated in one more layer and in the whole "
        "network; the most that a step has allocated; the process's peak above what it had before."
    ),
    "planner_memory": (
        "Peak memory of training recipes, as a dry run predicts it and as the operating system counted it: the most "
        "that a process had resident in two steps, above what it had before the model was built. Models of 14 to 69 M "
        "parameters in FP32."
    ),
    "moments": (
        "The forms of AdamW's moments, on train's model with random tokens. *optimizer*: clipping, update and freeing "
        "the gradients. Ratios are the speed of this part over FP32 moments'."
    ),
    "rounded_rollouts": (
        "GRPO from the speedrun's pre-trained model with rollouts from the weights that are trained, and from their "
        "twins in FP8, 8 and 4 bits with truncated importance sampling (where named, with another correction): pass@1 "
        "on 200 held-out problems of each environment, and how far the two policies differ, on average over the "
        "steps. Seed 0, and seed 1 as trained, ran beside other work. 8 and 4 bits are not measured yet."
    ),
    "rl_bias": (
        "GRPO from the speedrun's pre-trained mixture of experts with its balancing bias frozen, live (V3's speed), "
        "and frozen beside V3's sequence loss: pass@1 on 200 held-out problems of each environment, reward, and "
        "MaxVio, the busiest expert's load over the mean less one."
    ),
    "student": (
        "A student's network of 17 M parameters (latent attention, 20 experts) from a common start, which has read "
        "English and answers without reasoning: distillation from worked solutions or a model, sampling counted, "
        "against GRPO alone for as long. pass@1 with 95 % intervals on 200 held-out problems of each family."
    ),
    "exact": (
        "GRPO in the exact mode and without it, in turns: what a step costs, and the share of tokens whose "
        "log-probability as sampled differs in any bit from the trainer's. Then completions sampled in FP8, in 4 bits "
        "and in BF16, against the FP32 trainer. Ratios are the default's time over the exact mode's."
    ),
    "mtp_rl": (
        "Drafts of a small V3-style network's multi-token module that the network accepts, before 60 steps of GRPO and "
        "after them, with the module trained along and without. Ratios are acceptance with over without."
    ),
    "rl_reward": (
        "The reward that GRPO reaches in equal wall time on SmolLM2-135M-Instruct, against TRL's `GRPOTrainer`: sums "
        "of two numbers of two digits, two examples in the prompt, 64 completions of up to 48 tokens a step, same "
        "reward, sampling and optimizer. The side with less time on its clock takes the next step."
    ),
    "r1": (
        "R1's pipeline on SmolLM2-135M-Instruct (`recipes/r1-smollm2.toml`): pass@1 on held-out problems after each "
        "stage; stages from the first RL on once for each seed, intervals over problems of the means over seeds."
    ),
    "kv_drift": (
        "What a KV cache in 8 bits costs in accuracy: SmolLM2-135M-Instruct (grouped-query attention) and a small "
        "network with latent attention, trained for the benchmark on bytes, read the same texts of 1032 tokens with "
        "each cache. The difference is that of a token's log-probability, in nats, from the exact cache's. *greedy*: "
        "tokens of answers of 1000 that are the exact cache's, before the first that differs."
    ),
    "quantize": (
        "Perplexity on held-out English that comes with Python, before and after `rorqual quantize`, both computed in "
        "FP32 from the weights as stored. SmolLM2's only source here is a Q4_1 file, so that its weights were 4-bit "
        "numbers already, on another grid; the other model, a small mixture of experts, is trained here. Ratios are "
        "BF16's perplexity over the format's."
    ),
    "dispatch": (
        "Tokens on their way to experts, V3's routing (8 of 256 experts in at most 4 groups) at smaller widths: a "
        "training step of four micro-batches over 2 nodes, links of 1 Gb/s between them. Plain all-to-all, two hops, "
        "and two hops in FP8, each with and without overlap of two micro-batches, take turns in the same processes. "
        "Bytes are counted and asserted equal to the count from the routing; headers are what the link adds."
    ),
    "pipeline": (
        "Four processes run the same layers by 1F1B, ZB1P and DualPipeV in turn. With fewer cores than processes each "
        "action sleeps for a fixed time in place of computing, and for another in which tokens travel to experts; "
        "messages, order and turns are real."
    ),
    "expert_balance": (
        "Placement of V3's 58 × 256 experts with 32 redundant ones, from random heavy-tailed loads, against the greedy "
        "algorithm of the published balancer; balance is the busiest GPU's load over the mean. One thread."
    ),
    "processes": (
        "Pre-training of the speedrun's model by one process with all threads, and by processes of one thread with "
        "sequences of their own, on the same machine in turns."
    ),
    "revision": (
        "This version against an earlier commit of ours, both in one run and in turns: what changes of structure did "
        "to speed. Medians of six rounds (the speedrun's RL: twelve)."
    ),
    "gpu": (
        "Generation on one GPU, BF16, random weights, greedy, against transformers as it is by default (kernel by"
        " kernel, dynamic cache)."
    ),
}


def result(benchmark: str, machine: str) -> dict[str, Any] | None:
    path = RESULTS / f"{benchmark}-{machine}.json"
    return json.loads(path.read_text()) if path.exists() else None


# -- the page


def page() -> str:
    lines = [
        "# Benchmarks",
        "",
        *wrap(
            "This page is generated from `benchmarks/results/*.json` by `docs/make_benchmarks.py`. Reproduce with "
            "`make bench` (GPU: `benchmarks/gpu.py`). Each benchmark runs Rorqual and its peer in one run, in turns, "
            "each side in the fastest of the settings tried. A ratio above 1 means that Rorqual is faster (or better). "
            "CPUs: two shared cores. What the figures mean, one-off measurements and what was tried: "
            "[design notes](design-notes.md)."
        ),
    ]
    for benchmark, what in BENCHMARKS.items():
        if all(result(benchmark, machine) is None for machine in CLASSES):
            continue
        lines += ["", f"## {benchmark}", "", *wrap(f"`benchmarks/{benchmark}.py`. {what}")]
        for machine, name in CLASSES.items():
            found = result(benchmark, machine)
            if found is None:
                continue
            peers = found["figures"].get("peers", {}) if "vllm" in str(found["ratios"]) else {}
            versions = ", ".join(f"{package} {v}" for package, v in (found["versions"] | peers).items() if v)
            lines += ["", f"### {benchmark}: {name}", "", f"Commit `{found['commit']}`; {versions}.", ""]
            compared = [] if benchmark in UNCOMPARED else [ratios(found["ratios"])]
            for part in (compared, FIGURES[benchmark](found["figures"])):
                for rows in part:
                    lines += [*rows, ""]
            lines.pop()
    return "\n".join(lines) + "\n"


def wrap(text: str, width: int = 118) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


# -- the speed table of the READMEs

SPEED = [  # English, French, benchmark, ratio
    ("pre-training / transformers", "pré-entraînement / transformers", "train", "tokens-per-second/transformers"),
    ("GRPO step / TRL", "étape de GRPO / TRL", "rl_step", "step/trl"),
    ("decode, 1 sequence, 4-bit / llama.cpp", "décodage, 1 séquence, 4 bits / llama.cpp", "decode",
     "decode-b1-int4/llama.cpp-q4_0"),
    ("decode, 32 sequences, 4-bit / llama.cpp", "décodage, 32 séquences, 4 bits / llama.cpp", "decode",
     "decode-b32-int4/llama.cpp-q4_0"),
    ("prefill, 512 tokens, 4-bit / llama.cpp", "prefill, 512 jetons, 4 bits / llama.cpp", "decode",
     "prefill-512-int4/llama.cpp-q4_0"),
    ("serving, 1 client / llama.cpp", "service, 1 client / llama.cpp", "serving", "serving-c1-plain/llama.cpp"),
    ("serving, 8 clients / llama.cpp", "service, 8 clients / llama.cpp", "serving", "serving-c8-plain/llama.cpp"),
    ("serving, 32 clients / llama.cpp", "service, 32 clients / llama.cpp", "serving", "serving-c32-plain/llama.cpp"),
    ("serving, 32 clients / vLLM", "service, 32 clients / vLLM", "serving", "serving-c32-plain/vllm"),
    ("same, speculative decoding on / vLLM", "idem, avec décodage spéculatif / vLLM", "serving", "serving-c32/vllm"),
]  # fmt: skip
SHORT = {
    "zen5-avx512": "Zen 5", "zen4-avx512": "Zen 4", "emeraldrapids-amx": "Xeon, AMX", "emeraldrapids-avx512": "Xeon",
    "epyc-avx512": "EPYC, BF16", "zen3-avx2": "Zen 3, AVX2",
}  # fmt: skip
MARKS = "<!-- speed: written by docs/make_benchmarks.py -->", "<!-- /speed -->"


def ratio(benchmark: str, machine: str, key: str) -> float | None:
    """A ratio; of serving, `-plain` ones are without speculative decoding, as all are in files that have none."""
    found = (result(benchmark, machine) or {"ratios": {}})["ratios"]
    if benchmark != "serving" or any("-plain" in name for name in found):
        return found.get(key)
    return found.get(key.replace("-plain", "")) if "-plain" in key else None


def speed_table(french: bool = False) -> str:
    rows = []
    for english, other, benchmark, key in SPEED:
        values = [ratio(benchmark, machine, key) for machine in SHORT]
        rows.append([other if french else english, *(DASH if v is None else f"{v:.2f}" for v in values)])
    first = "notre vitesse / celle du concurrent" if french else "our speed / the peer's"
    return "\n".join(table([first, *SHORT.values()], rows))


def readme(text: str, french: bool) -> str:
    """The text with today's speed table."""
    begin, end = MARKS
    before, rest = text.split(begin)
    return f"{before}{begin}\n{speed_table(french)}\n{end}{rest.split(end)[1]}"


READMES = {ROOT / "README.md": False, ROOT / "README.fr.md": True}


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    found = {PAGE: page()}
    for path, french in READMES.items():
        found[path] = readme(path.read_text(encoding="utf-8"), french)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path}: written")
