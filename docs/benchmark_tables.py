"""Tables of docs/benchmarks.md: of one benchmark's figures in benchmarks/results/ (make_benchmarks.py)."""

import re
from collections.abc import Iterable
from statistics import mean, median
from typing import Any

DASH = "–"

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


def ratios(found: dict[str, float]) -> list[str]:
    """One row a measurement, one column a peer; shares of a whole have none, and are in the other tables."""
    pairs = {tuple(key.split("/", 1)): value for key, value in found.items() if "/" in key}
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
    rows = [["baseline", DASH, DASH, DASH, DASH, f"{mean(bits['baseline']):.4f}"]]
    for name, x in nats.items():
        seeds = ", ".join(f"{value:+.4f}" for value in x["seeds"])
        both = cell(found["nats_above_both"][name], 1) if name in found["nats_above_both"] else DASH
        rows.append([name, cell(x, 1), both, cell(relative[name], 100), seeds, f"{mean(bits[name]):.4f}"])
    cosines = found["gradient_cosines"]
    layers = [[layer, *(f"{cosines[name][layer]:.4f}" for name in cosines)] for layer in next(iter(cosines.values()))]
    base = found["baseline_loss"]
    first = f"baseline {mean(base['seeds']):.4f}, seeds ±{base['spread']:.4f}"
    return [
        table([first, "nats above", "above both", "% above", "by seed", "bits per byte"], rows),
        table(["cosine of the gradient with the baseline's", *cosines], layers),
    ]


def planner_memory(found: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, each in found["bytes"].items():
        predicted, measured = each["predicted"]["total"], each["measured"]
        error = f"{predicted / measured - 1:+.1%}"
        rows.append([name, f"{measured / 1e6:,.0f}", f"{predicted / 1e6:,.0f}", error])
    return [table(["recipe", "measured, MB", "predicted, MB", "error"], rows)]


def planner_rl(found: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, each in found["recipes"].items():
        row = [name, f"{each['mean_length']:.0f}", f"{each['seconds']:.3g}"]
        for kind in ("calibrated", "lengths_known", "rehearsed"):
            row.append(f"{each[kind]:.3g} ({each[f'{kind}_error']:+.0%})")
        rows.append(row)
    columns = ["recipe", "tokens an answer", "s a step", "calibrated alone", "with its lengths", "rehearsed"]
    return [table(columns, rows)]


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


def classes(found: dict[str, Any]) -> list[list[str]]:
    rows = [[name, work, x["commit"]] for name, works in found.items() for work, x in works.items()]
    return [table(["class", "benchmark", "commit"], rows)]


def kernels(found: dict[str, Any]) -> list[list[str]]:
    levels = found["levels"]
    best = next(iter(levels))
    rows = [
        [name, f"{x['bytes'] / x['seconds'] / 1e9:.1f}",
         f"{x['operations'] / x['seconds'] / 1e9:.0f}" if x["operations"] else DASH, f"{x['share']:.2f}",
         *(1e3 * own[name]["seconds"] for own in levels.values())]
        for name, x in levels[best].items()
    ]  # fmt: skip
    roof = found["roofs"]
    rows.append(["*roof*", f"{roof['bytes'] / 1e9:.1f}", f"{roof['operations'] / 1e9:.0f}", "1", *[DASH] * len(levels)])
    columns = ["GB/s", "GFLOP/s", "of the roof", *(f"{name}, ms" for name in levels)]
    return [table([f"kernel ({best})", *columns], rows)]


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


def dispatch(found: dict[str, Any]) -> list[list[str]]:
    how = found["links"]["how"]
    measured = [
        _dispatch(f"2 nodes × {found['ranks'] // 2} ranks, {how}", found["contestants"]),
        _dispatch("2 nodes × 1 rank", found["one_rank_a_node"]),
    ]
    v3 = found["v3"]
    computed = [
        [name, f"{x['rows']:.2f}", f"{x['between_nodes'] / 1e3:.1f}", f"{x['share_of_dispatch']:.1%}",
         f"{x['share']:.1%}"]
        for name, x in v3.items() if isinstance(x, dict)
    ]  # fmt: skip
    of_v3 = [
        "V3 on 8 nodes × 8 GPUs, computed",
        "rows a token",
        "kB a token and layer",
        "of plain's dispatch",
        "of plain",
    ]
    return [*measured, table(of_v3, computed)]


def _dispatch(title: str, contestants: dict[str, Any]) -> list[str]:
    rows = [
        [
            name, median(x["seconds"]), _range(x["speed"]), _range(x.get("gain")),
            f"{x['hidden']:.0%}" if "hidden" in x else DASH, f"{x['between_nodes'] / 1e6:.1f}",
            f"{x['share_between_nodes']:.1%}", DASH if x["headers"] is None else f"{x['headers']:+.1%}",
        ]
        for name, x in contestants.items()
    ]  # fmt: skip
    columns = [title, "s/step", "speed", "by overlap", "travel hidden", "MB between nodes", "of plain", "headers"]
    return table(columns, rows)


def _range(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})" if ratio else DASH


def pipeline(found: dict[str, Any]) -> list[list[str]]:
    parts = []
    what = {"sleep": "sleeps in place of computing", "compute": "computes"}[found["mode"]]
    for more, x in (("", found), (", no travel to experts", found.get("without_travel"))):
        if x is not None:
            rows = [
                [name, f"{s['seconds']:.2f}", f"{s['bubble']:.1%}", f"{s['bubble_simulated']:.1%}"]
                for name, s in x.items() if isinstance(s, dict) and "bubble_simulated" in s
            ]  # fmt: skip
            parts.append(
                table([f"{found['processes']} processes, {what}{more}", "s/step", "bubble", "simulated"], rows)
            )
    return parts


def expert_balance(found: dict[str, Any]) -> list[list[str]]:
    rows = [
        [key, f"{found['milliseconds'][key]:.1f}", *(f"{value:.4f}" for value in balance.values())]
        for key, balance in found["balance"].items()
    ]
    how = next(iter(found["balance"].values()))
    return [table(["phase and spread of loads", "ms", *(f"balance, {name}" for name in how)], rows)]


def processes(found: dict[str, Any]) -> list[list[str]]:
    speed, number = found["tokens_per_second"], found["processes"]
    rows = [
        [f"one process, {number} threads", speed["one process"]],
        [f"{number} processes, one thread each", speed["processes"]],
    ]
    return [table(["", "tokens/s"], rows)]


FIGURES = {
    f.__name__: f
    for f in (
        train,
        rl_step,
        rollout,
        balance,
        decode,
        classes,
        kernels,
        speculate,
        serving,
        fp8_loss,
        fp8_memory,
        planner_memory,
        planner_rl,
        moments,
        kv_drift,
        quantize,
        dispatch,
        pipeline,
        expert_balance,
        processes,
        revision,
        gpu,
    )
}


def _setting(settings: dict[str, Any]) -> str:
    words = [str(v) for k, v in settings.items() if k != "compiled"]
    return ", ".join([*words, "compiled" if settings["compiled"] else "not compiled"])
