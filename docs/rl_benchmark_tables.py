"""Tables of docs/benchmarks.md on reinforcement learning, as benchmark_tables.py has those of the rest."""

from statistics import mean, median
from typing import Any

from benchmark_tables import DASH, table


def rounded_rollouts(found: dict[str, Any]) -> list[list[str]]:
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
    names = ("mismatch_logprob", "mismatch_kl", "importance_truncated", "routers_differ")
    rounded = {form: runs for form, runs in by_form.items() if names[0] in runs[0]}
    values = {
        form: [[v for run in runs for v in run[name] if v is not None] for name in names]
        for form, runs in rounded.items()
    }
    rows = [[form, *(f"{mean(own):.2g}" if own else DASH for own in found)] for form, found in values.items()]
    return [*parts, table(["mismatch", *names], rows)]


def rl_bias(found: dict[str, Any]) -> list[list[str]]:
    by_form, last = {}, max(1, found["steps"] // 6)
    for run in found["runs"]:
        by_form.setdefault(run["form"], []).append(run)
    rows = [
        [
            form, f"{mean(run['before'] for run in runs):.3f}", f"{mean(run['after'] for run in runs):.3f}",
            ", ".join(f"{run['after']:.3f}" for run in runs),
            *(f"{mean(mean(run[name][-last:]) for run in runs):.3f}" for name in ("reward", "max_vio")),
        ]
        for form, runs in by_form.items()
    ]  # fmt: skip
    columns = ["balance", "pass@1 before", "after", "by seed", "reward at the end", "MaxVio at the end"]
    return [table(columns, rows)]


def student(found: dict[str, Any]) -> list[list[str]]:
    def cells(run: dict[str, Any]) -> list[str]:
        shares = [(task["pass_at_1"], *task["interval"]) for task in run["tasks"].values()]
        return [*(f"{x:.3f} [{low:.3f}, {high:.3f}]" for x, low, high in shares), f"{run['pass_at_1']:.3f}"]

    rows = [["start", DASH, DASH, *cells(found["before"])]]
    for run in found["runs"]:
        times = [f"{run.get('sampling', 0):.0f}", f"{run['training']:.0f}"]
        rows.append([f"{run['branch']}, seed {run['seed']}", *times, *cells(run)])
    columns = ["", "sampling, s", "training, s", *found["before"]["tasks"], "mean"]
    differences = [
        [f"distillation over {branch}", f"{100 * x['mean']:+.1f}",
         "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in x["interval"])) if x["interval"] else DASH]
        for branch, x in found["differences"].items()
    ]  # fmt: skip
    return [
        [f"Teacher: {found['teacher']}.", "", *table(columns, rows)],
        table(["difference", "points", "95 %, over seeds"], differences),
    ]


def exact(found: dict[str, Any]) -> list[list[str]]:
    costs: list[list[Any]] = []
    differences: list[list[Any]] = []
    for name, own in found.items():
        if name in ("steps", "turns"):
            continue
        for mode, run in own["modes"].items():
            compared = [step for step in run["steps"] if step["mismatch_share"] is not None]
            times = (
                1e3 * median(s[f"{part}_seconds_a_token"] for s in run["steps"][1 : found["turns"]]) for part in PARTS
            )
            share = f"{100 * mean(s['mismatch_share'] for s in compared):.2f} %"
            largest = f"{max(s['mismatch_max'] for s in compared):.2g}"
            costs.append([f"{name}, {mode}", median(run["seconds"]), *times, share, largest])
        for form, x in own["rounded"].items():
            shown = f"{100 * x['share']:.2f} %", f"{x['mean']:.2g}", f"{x['largest']:.2g}"
            differences.append([f"{name}, {form}", *shown])
    columns = ["mode", "s/step", "rollout, ms/token", "update, ms/token", "tokens that differ", "largest"]
    return [
        table(columns, costs),
        table(["rollouts against the FP32 trainer", "tokens that differ", "mean difference", "largest"], differences),
    ]


PARTS = ("rollout", "update")


def mtp_rl(found: dict[str, Any]) -> list[list[str]]:
    rows = [["before RL", DASH, f"{found['before']:.3f}", DASH]]
    for run in found["runs"]:
        name = f"after, `mtp.weight = {run['weight']:g}`"
        rows.append([name, str(run["seed"]), f"{run['acceptance']:.3f}", f"{run['reward']:.3f}"])
    return [table(["", "seed", "drafts accepted", "reward of the last step"], rows)]


def rl_reward(found: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            side, len(own["rewards"]), f"{median(own['seconds']):.1f}",
            *(DASH if part is None else f"{part:.3f}" for part in own["parts"]),
        ]
        for side, own in ((side, found[side]) for side in ("rorqual", "trl") if side in found)
    ]  # fmt: skip
    number = len(found["rorqual"]["parts"])
    parts = [f"reward, part {i} of {number}" for i in range(1, number + 1)]
    return [table([f"{found['minutes']:g} minutes each, {found['dtype']}", "steps", "s/step", *parts], rows)]


def r1(found: dict[str, Any]) -> list[list[str]]:
    stages, before_rl = found["stages"], found["before_rl"]
    tasks = list(stages["start"])

    def rows(field: str) -> list[list[str]]:
        shown: list[list[str]] = []
        for stage, own in stages.items():
            cells = [DASH if field not in own.get(task, {}) else _percent(own[task], field) for task in tasks]
            if set(cells) != {DASH}:
                shown.append([stage, *cells])
        return shown

    by_seed = [
        [
            stage,
            *(", ".join(f"{100 * run:.1f}" for run in own[task]["runs"]) if task in own else DASH for task in tasks),
        ]
        for stage, own in stages.items()
        if any(len(own[task]["runs"]) > 1 for task in own)
    ]
    times = [[name, ", ".join(f"{seconds:.0f}" for seconds in own)] for name, own in found["seconds"].items()]
    return [
        table(["pass@1, %, after", *tasks], rows("mean")),
        table(["gain over the untouched model, points", *tasks], rows("gain_over_start")),
        table([f"gain over {before_rl} alone, points", *tasks], rows(f"gain_over_{before_rl}")),
        table(["pass@1 by seed, %", *tasks], by_seed),
        table(["stage", "seconds, by seed"], times),
    ]


def _percent(entry: dict[str, Any], field: str) -> str:
    values = [entry["mean"], *entry["interval"]] if field == "mean" else entry[field]
    sign = "" if field == "mean" else "+"
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} [{low}, {high}]"


FIGURES = {f.__name__: f for f in (rounded_rollouts, rl_bias, student, exact, mtp_rl, rl_reward, r1)}
