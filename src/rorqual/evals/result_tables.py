"""Terminal tables of evaluations."""

from collections.abc import Mapping

from rich.table import Table

from rorqual.evals.results import Evaluation, Gain, Interval, Scores


def table(result: Evaluation, title: str | None = None) -> Table:
    """A row per task, and per difficulty where there are several."""
    k = result.k
    caption = f"{result.samples} samples per problem at temperature {result.temperature}; 95 % intervals"
    out = Table(title=title, caption=caption)
    out.add_column("task", justify="left")
    for name in (
        "problems",
        "pass@1",
        f"cons@{k}",
        f"pass@{k}",
        "tokens",
        "truncated",
        "self-verified",
        "verifier precision",
    ):
        out.add_column(name, justify="right")
    for name, found in result.tasks.items():
        out.add_row(name, *_cells(found))
        if len(found.by_difficulty) > 1:
            for level, part in found.by_difficulty.items():
                out.add_row(f"  {level}", *_cells(part), style="dim")
    return out


def gains_table(gains: Mapping[str, Gain]) -> Table:
    """The result of `compare`."""
    out = Table(caption="points of pass@1, paired by problem; 95 % intervals")
    out.add_column("task")
    out.add_column("gain", justify="right")
    for name, found in gains.items():
        low, high = (100 * bound for bound in found.interval)
        out.add_row(name, f"{100 * found.gain:+.1f} [{low:+.1f}, {high:+.1f}]")
    return out


def _cells(found: Scores) -> list[str]:
    return [
        str(found.problems),
        _with_interval(found.pass_at_1, found.interval),
        _with_interval(found.cons_at_k, found.cons_interval),
        _with_interval(found.pass_at_k, found.pass_k_interval),
        f"{found.mean_tokens:.0f}",
        _percent(found.truncated_share),
        _percent(found.verified_share),
        _percent(found.verdict_precision),
    ]


def _with_interval(share: float | None, bounds: Interval | None) -> str:
    if share is None or bounds is None:
        return "–"
    low, high = bounds
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
