"""Terminal tables of evaluations."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from rorqual.evals.results import Audit, Evaluation, Gain, Interval, Scores

QUESTION = 200  # characters of a question that are shown


def table(result: Evaluation, title: str | None = None) -> Table:
    """A row per task, and below it per difficulty where there are several, and per published metric beside pass@1.

    The model's own verdicts have columns where it gave any.
    """
    k, marks = result.k, any(found.verified_share for found in result.tasks.values())
    out = Table(title=title, caption=_settings(result))
    out.add_column("task", justify="left")
    verdicts = ("self-verified", "verifier precision") if marks else ()
    for name in ("problems", "pass@1", f"cons@{k}", f"pass@{k}", "tokens", "truncated", *verdicts):
        out.add_column(name, justify="right")
    for name, found in result.tasks.items():
        out.add_row(name, *_cells(found, marks))
        for metric, value in found.metrics.items():
            out.add_row(f"  {metric}", "", _with_interval(value.value, value.interval), style="dim")
        if len(found.by_difficulty) > 1:
            for level, part in found.by_difficulty.items():
                out.add_row(f"  {level}", *_cells(part, marks), style="dim")
    return out


def audit_tables(audits: Mapping[str, Audit]) -> list[Table]:
    """How often the judges disagree, and the drawn disagreements."""
    share = Table(title="audit of the judges", caption="of the finished answers")
    for name in ("task", "judge", "second judge", "answers", "disagreement", "only the judge", "only the second"):
        share.add_column(name, justify="left" if "judge" in name[:12] or name == "task" else "right")
    drawn = Table(title="disagreements", show_lines=True)
    for name in ("task", "question", "right", "answer", "end of the reply", "judge", "second"):
        drawn.add_column(name, overflow="fold")
    for task, found in audits.items():
        of_all = _percent(found.share if found.answers else None)
        counts = map(str, (found.answers, of_all, found.only_first, found.only_second))
        share.add_row(task, found.judge, found.second_judge, *counts)
        for one in found.drawn:
            marks = ("right", "wrong") if one.correct else ("wrong", "right")
            texts = (one.question[-QUESTION:], one.reference[:QUESTION], one.answer or "–", one.reply)
            drawn.add_row(task, *map(escape, texts), *marks)
    return [share, drawn] if drawn.row_count else [share]


def gains_table(gains: Mapping[str, Gain], title: str | None = None) -> Table:
    """The result of `compare`; title: what is compared."""
    out = Table(title=title, caption="points of pass@1, paired by problem; 95 % intervals")
    out.add_column("task")
    out.add_column("gain", justify="right")
    for name, found in gains.items():
        low, high = (100 * bound for bound in found.interval)
        out.add_row(name, f"{100 * found.gain:+.1f} [{low:+.1f}, {high:+.1f}]")
    return out


def _settings(result: Evaluation) -> str:
    """How the answers were sampled and judged."""
    budget = "" if result.thinking_budget is None else f", {result.thinking_budget} of thinking"
    tasks = dict[str, list[str]]()
    for name, found in result.tasks.items():
        tasks.setdefault(found.judge, []).append(name)
    judges = "; ".join(judge if len(tasks) == 1 else f"{', '.join(names)}: {judge}" for judge, names in tasks.items())
    long = "".join(
        f"; {found.unasked} questions of {name} exceed the context"
        for name, found in result.tasks.items()
        if found.unasked
    )
    return (
        f"{result.samples} samples per problem at temperature {result.temperature:g}, top-p {result.top_p:g}, at most "
        f"{result.max_tokens} tokens{budget}, seed {result.seed}; 95 % intervals; truncated: unfinished answers{long}; "
        f"judged by {escape(judges)}"
    )


def _cells(found: Scores, marks: bool) -> list[str]:
    """marks: with the model's own verdicts."""
    verdicts = [_percent(found.verified_share), _percent(found.verdict_precision)] if marks else []
    return [
        str(found.problems),
        _with_interval(found.pass_at_1, found.interval),
        _with_interval(found.cons_at_k, found.cons_interval),
        _with_interval(found.pass_at_k, found.pass_k_interval),
        f"{found.mean_tokens:.0f}",
        _percent(found.truncated_share),
        *verdicts,
    ]


def _with_interval(share: float | None, bounds: Interval | None) -> str:
    if share is None or bounds is None:
        return "–"
    low, high = bounds
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
