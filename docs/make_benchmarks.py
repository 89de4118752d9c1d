"""Writes docs/benchmarks.md, and the speed tables of README.md and README.fr.md, from benchmarks/results/*.json.

python docs/make_benchmarks.py            # after `make bench`; tests/docs fails while they differ
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
DASH = "–"

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

UNCOMPARED = ("fp8_loss", "fp8_memory", "fp8_rollouts", "kv_drift", "revision")  # without a peer

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
    "moments": (
        "The forms of AdamW's moments, on train's model with random tokens. *optimizer*: clipping, update and freeing "
        "the gradients. Ratios are the speed of this part over FP32 moments'."
    ),
    "fp8_rollouts": (
        "GRPO from the speedrun's pre-trained model with rollouts from the weights that are trained, and from their "
        "FP8 twin with truncated importance sampling: pass@1 on 200 held-out problems of each environment, and how far "
        "the two policies differ."
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
    "revision": (
        "This version against an earlier commit of ours, both in one run and in turns: what changes of structure did "
        "to speed. Medians of six rounds (the speedrun's RL: twelve)."
    ),
    "gpu": (
        "Generation on one GPU, BF16, random weights, greedy, against transformers as it is by default (kernel by"
        " kernel, dynamic cache)."
    ),
}

NAMES = {  # words of the files → words of the page
    "dense-active-size": "dense, active", "dense-total-size": "dense, total",
    "guesses right, %": "accepted, %", "tokens a pass": "tokens/pass", "same answers, %": "same output, %",
    "s a step": "s/step", "learning, s": "training, s", "rollout, ms a token": "rollout, ms/token",
    "200 problems a family read, s": "prefill of 400 problems, s",
    "itl": "ITL", "tpot": "TPOT", "ttft": "TTFT",
}  # fmt: skip


def rename(text: str) -> str:
    text = NAMES.get(text, text).replace("look-up", "ngram").replace("lookup", "ngram")
    return re.sub(r"-(ttft|itl|tpot)$", lambda m: " " + NAMES[m[1]], text)


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits, whole numbers in full."""
    if value is None:
        return DASH
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def table(columns: list[str], rows: Iterable[list[Any]]) -> list[str]:
    shown = [[number(cell) if not isinstance(cell, str) else cell for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *shown)]


def result(benchmark: str, machine: str) -> dict[str, Any] | None:
    path = RESULTS / f"{benchmark}-{machine}.json"
    return json.loads(path.read_text()) if path.exists() else None


# -- one result


def ratios(found: dict[str, float]) -> list[str]:
    """One row a measurement, one column a peer."""
    pairs = {tuple(key.split("/", 1)): value for key, value in found.items()}
    rows, peers = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    cells = [
        [rename(row), *(f"{pairs[row, peer]:.2f}" if (row, peer) in pairs else DASH for peer in peers)] for row in rows
    ]
    return table(["ratio to", *map(rename, peers)], cells)


def train(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for side in ("rorqual", "transformers"):
        x = found[side]
        percent = 100 * x["utilisation"]
        rows.append([side, _setting(x["settings"]), x["tokens_per_second"], percent, f"{x['loss']:.4f}"])
    return [table(["", "setting", "tokens/s", "% of matrix peak", "loss at the end"], rows)]


def rl_step(found: dict[str, Any]) -> list[list[str]]:
    names = ("dtype", "seconds", "rollout_seconds", "training_seconds", "ms_per_completion_token")
    rows = [[side, *(found[side][name] for name in names)] for side in ("rorqual", "trl")]
    return [table(["", "dtype", "s/step", "rollout, s", "training, s", "ms/sampled token"], rows)]


def rollout(found: dict[str, Any]) -> list[list[str]]:
    before, now = found["rounds"]["before"], found["rounds"]["now"]
    rows = []
    for name in now:
        ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**found["ratio_of_rounds"][name])
        rows.append([rename(name), median(before[name]), median(now[name]), ratio])
    return [table(["median of the rounds", "before", "now", "ratio of rounds"], rows)]


def balance(found: dict[str, Any]) -> list[list[str]]:
    names = {"bias": "correction bias", "auxiliary loss": "auxiliary loss", "none": "no balancing", "dense": "dense"}
    rows = []
    for name, shown in names.items():
        x = found[name]
        bits = f"{x['bits_per_byte']:.3f} ± {x['bits_per_byte_deviation']:.3f}"
        vio = x["max_vio"], x["max_vio_of_batches"] or None
        rows.append([shown, x["flops_per_token"] / 1e6, x["parameters"] / 1e6, *vio, bits])
    columns = ["", "MFLOP/token", "M parameters", "MaxVio, held-out", "MaxVio of a batch, at the end", "bits/byte"]
    return [table(columns, rows)]


def decode(found: dict[str, Any]) -> list[list[str]]:
    speeds = found["tokens_per_second"]
    sides = list(dict.fromkeys(side for work in speeds for side in speeds[work]))
    rows = [[side, *(_speed(work, speeds[work].get(side)) for work in speeds)] for side in sides]
    columns = ["", "perplexity", "exact activations", "logits differ by, %", "MB of weights/token"]
    bits = [[f"{c:.2f}" if isinstance(c, float) else c or DASH for c in row] for row in found["perplexity"]]
    mixture = [[name, median(x)] for name, x in found["mixture"]["tokens_per_second"].items()]
    return [
        table(["tokens/s; first token in ms", *speeds], rows),
        table(columns, bits),
        table(["one sequence, 4 bits", "tokens/s"], mixture),
    ]


def _speed(work: str, rounds: list[float] | None) -> float | None:
    if not rounds:
        return None
    return 1000 / median(rounds) if work.startswith("first-token") else median(rounds)


def gpu(found: dict[str, Any]) -> list[list[str]]:
    sides = ("rorqual", "transformers")
    rows = [[work, *(median(x[side]) for side in sides)] for work, x in found["tokens_per_second"].items()]
    return [table(["tokens/s", *sides], rows)]


def speculate(found: dict[str, Any]) -> list[list[str]]:
    return [table(["", *map(rename, found["columns"][1:])], ([rename(r[0]), *r[1:]] for r in found["rows"]))]


def serving(found: dict[str, Any]) -> list[list[str]]:
    loads, tried = found["loads"], found["tried_tokens_per_second"]
    last = "tpot" if any("tpot_ms_p50" in x for sides in loads.values() for x in sides.values()) else "itl"
    rows = []
    for load, sides in loads.items():
        for side, x in sides.items():
            times = [f"{number(x[f'{of}_ms_p50'])} / {number(x[f'{of}_ms_p95'])}" for of in ("ttft", last)]
            rows.append([load, f"{side} {rename(x['format'])}", x["tokens_per_second"], *times])
    columns = ["load", "side", "tokens/s", "TTFT, ms, p50 / p95", f"{last.upper()}, ms, p50 / p95"]
    tries = list(dict.fromkeys(load for speeds in tried.values() for load in speeds))
    formats = [[rename(name), *(speeds.get(load) for load in tries)] for name, speeds in tried.items()]
    return [table(columns, rows), table(["formats tried, tokens/s", *tries], formats)]


def kv_drift(found: dict[str, Any]) -> list[list[str]]:
    rows, bands = [], []
    for model, x in found.items():
        for name, cache in x["caches"].items():
            greedy = ", ".join(map(str, cache["same_tokens"]))
            rows.append([model, name, f"{cache['bytes']} / {x['exact_bytes']}", greedy])
            bands += [
                [model, name, str(b["position"]), f"{100 * b['same_top']:.1f}", f"{b['mean']:.2g}", f"{b['p99']:.2g}"]
                for b in cache["forced"]
            ]
    columns = ["model", "cache", "from token", "same top token, %", "difference, mean", "99th percentile"]
    return [table(["model", "cache", "bytes/token, of exact", "greedy"], rows), table(columns, bands)]


def revision(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, rounds in found["rounds"].items():
        ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**found["ratio_of_rounds"][name])
        rows.append([rename(name), f"{median(rounds['before']):.4g}", f"{median(rounds['now']):.4g}", ratio])
    return [table(["", f"`{found['before']}`", "now", "ratio of rounds"], rows)]


def fp8_loss(found: dict[str, Any]) -> list[list[str]]:
    def cell(x: dict[str, Any], factor: float) -> str:
        low, high = x["interval"]
        return f"{factor * x['mean']:+.4f} [{factor * low:+.4f}, {factor * high:+.4f}]"

    nats, relative, bits = (found[key] for key in ("nats_difference", "relative_loss_difference", "bits_per_byte"))
    rows = [["baseline", DASH, DASH, DASH, f"{mean(bits['baseline']):.4f}"]]
    for name, x in nats.items():
        seeds = ", ".join(f"{value:+.4f}" for value in x["seeds"])
        rows.append([name, cell(x, 1), cell(relative[name], 100), seeds, f"{mean(bits[name]):.4f}"])
    cosines = found["gradient_cosines"]
    layers = [[layer, *(f"{cosines[name][layer]:.4f}" for name in cosines)] for layer in next(iter(cosines.values()))]
    base = found["baseline_loss"]
    first = f"baseline {mean(base['seeds']):.4f}, seeds ±{base['spread']:.4f}"
    return [
        table([first, "nats above", "% above", "by seed", "bits per byte"], rows),
        table(["cosine of the gradient with the baseline's", *cosines], layers),
    ]


def fp8_memory(found: dict[str, Any]) -> list[list[str]]:
    parts, state = [], ("weights", "masters", "gradients", "moments")
    columns = [*state, "a layer", "network", "of baseline", "peak, MB", "process, MB"]
    for dtype, forms in found["bytes"].items():
        base = forms["baseline"]["kept"]
        rows = [
            [form, *(f"{x[key]:.2f}" for key in state), f"{x['kept_by_layer']:.0f}", f"{x['kept']:.0f}",
             f"{x['kept'] / base:.2f}", f"{x['peak'] / 1e6:.0f}", f"{x['resident'] / 1e6:.0f}"]
            for form, x in forms.items()
        ]  # fmt: skip
        parts.append(table([f"{dtype}, {found['tokens'][dtype]} tokens", *columns], rows))
    times = {form: median(seconds[1:]) for form, seconds in found["step_seconds"].items()}
    rows = [[form, f"{t:.2f}", f"{t / times['baseline']:.2f}"] for form, t in times.items()]
    return [*parts, table(["", "seconds a step", "of the baseline's"], rows)]


def moments(found: dict[str, Any]) -> list[list[str]]:
    count = found["parameters"]
    rows = [
        [form, f"{1e3 * x['optimizer_seconds']:.1f}", f"{1e3 * x['step_seconds']:.0f}",
         f"{x['state_bytes']['moments'] / count:.2f}"]
        for form, x in found.items() if form != "parameters"
    ]  # fmt: skip
    return [table(["moments", "optimizer, ms", "step, ms", "bytes a parameter"], rows)]


def fp8_rollouts(found: dict[str, Any]) -> list[list[str]]:
    rows, by_form = [], {}
    for run in found["runs"]:
        by_form.setdefault(run["form"], []).append(run)
    for form, runs in by_form.items():
        rows.append([
            form, f"{mean(run['before'] for run in runs):.3f}", f"{mean(run['after'] for run in runs):.3f}",
            ", ".join(f"{run['after']:.3f}" for run in runs),
            f"{median(run['tokens_per_second'] for run in runs):.0f}",
        ])  # fmt: skip
    parts = [table(["rollouts", "pass@1 before", "after", "by seed", "tokens/s"], rows)]
    last = max(1, found["steps"] // 6)
    names = ("mismatch_logprob", "mismatch_kl", "importance_truncated", "routers_differ")
    values = {name: [[v for v in run[name] if v is not None] for run in by_form["fp8"]] for name in names}
    rows = [
        [name, *(f"{x:.2g}" for x in (mean(chain(*own)), max(chain(*own)), mean(mean(x[-last:]) for x in own)))]
        for name, own in values.items()
    ]
    return [*parts, table(["mismatch", "mean", "largest", "at the end"], rows)]


def quantize(found: dict[str, Any]) -> list[list[str]]:
    parts = []
    for model, rows in found["models"].items():
        cells = []
        for x in rows:
            change = f"{100 * x['change']:+.2f} %" if "change" in x else DASH
            bar = f"{100 * x['bar']:g} %: {'met' if x['met'] else 'missed'}" if "bar" in x else DASH
            error = f"{100 * x['output_error']:.2f} %" if "output_error" in x else DASH
            cells.append([x["name"], f"{x['perplexity']:.3f}", change, bar, error, f"{x['megabytes']:.1f}"])
        parts.append(table([model, "perplexity", "change", "bar", "error of outputs", "MB"], cells))
    return parts


FIGURES = {
    f.__name__: f
    for f in (
        train,
        rl_step,
        rollout,
        balance,
        decode,
        speculate,
        serving,
        fp8_loss,
        fp8_memory,
        moments,
        fp8_rollouts,
        kv_drift,
        quantize,
        revision,
        gpu,
    )
}


def _setting(settings: dict[str, Any]) -> str:
    words = [str(v) for k, v in settings.items() if k != "compiled"]
    return ", ".join([*words, "compiled" if settings["compiled"] else "not compiled"])


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
