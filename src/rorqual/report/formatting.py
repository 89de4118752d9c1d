"""Format numbers for the report, and write its two summary sentences."""

from typing import Any

from rorqual.report.run_record import Part, Run, is_number, stage_name


def count(value: float) -> str:
    """1234567 → "1.23 M"."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def flops(value: float) -> str:
    """1.23e15 → "1.23 PFLOP"."""
    for size, letter in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}FLOP"
    return f"{value:.0f} FLOP"


def duration(seconds: float) -> str:
    """125 → "2 min 5 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: Any) -> str:
    """0.123 → "12.3 %"; a dash for what is not a number."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if is_number(share) else "–"


def with_interval(result: dict[str, Any], name: str, bounds: str) -> str:
    """ "61.2 % [58.1, 64.2]", or a dash."""
    if not is_number(result.get(name)):
        return "–"
    low, high = result.get(bounds) or (None, None)
    if not (is_number(low) and is_number(high)):
        return percent(result[name])
    return f"{percent(result[name])} [{100 * low:.1f}, {100 * high:.1f}]"


def opening(run: Run) -> str:
    """Two sentences: what was run, and its results."""
    return _whole_run(run, run.families[0]) if run.families else _training_only(run)


def _whole_run(run: Run, family: str) -> str:
    results = run.results(family)
    (first_stage, first), last = results[0], run.released(family)[-1]
    stages = [stage_name(stage) for stage in run.stages]
    through = f"{', '.join(stages[:-1])} and {stages[-1]}" if len(stages) > 1 else stages[0]
    seconds = run.summary.get("total_seconds")
    took = f" in {duration(seconds)}" if is_number(seconds) else ""
    problems = f"{last['problems']} " if "problems" in last else ""
    one = f"This run did {through}{took}; the model solves "
    one += f"{with_interval(last, 'pass_at_1', 'interval')} of {problems}held-out {family} problems (pass@1)"
    one += f", against {percent(first['pass_at_1'])} after {first_stage}." if len(results) > 1 else "."
    parts = []
    if is_number(last.get("cons_at_k")):
        parts.append(f"a majority vote of {last.get('k', 'k')} answers solves {percent(last['cons_at_k'])}")
    if is_number(last.get("pass_at_k")):
        parts.append(f"at least one of {last.get('k', 'k')} is correct for {percent(last['pass_at_k'])}")
    if last.get("verified_share") and is_number(last.get("verdict_precision")):
        share, precision = percent(last["verified_share"]), percent(last["verdict_precision"])
        parts.append(f"it marks {share} of its answers as verified, of which {precision} are correct")
    two = "; ".join(parts)
    return f"{one} {two[0].upper()}{two[1:]}." if two else one


def _training_only(run: Run) -> str:
    parts = [part for part in run.parts if part.lines]
    if not parts:
        return "This run has written no metrics yet. What it has written so far is below."
    part = parts[-1]
    steps, last = part.lines[-1]["step"], part.lines[-1]
    took = f" in {duration(last['seconds'])}" if is_number(last.get("seconds")) else ""
    trained = f" on {count(last['tokens'])} tokens" if is_number(last.get("tokens")) else ""
    one = f"{part.title} made {steps} steps{trained}{took}."
    for key, what in (
        ("reward_accuracy", "Accuracy in training"),
        ("reward", "The mean reward"),
        ("valid_bpb", "Held-out bits per byte"),
        ("valid_accuracy", "Held-out accuracy"),
        ("loss", "The training loss"),
    ):
        if change := _change(part, key):
            return f"{one} {what} went from {change[0]:.3g} to {change[1]:.3g}."
    return one


def _change(part: Part, key: str) -> tuple[float, float] | None:
    """(first, last) value of a metric, each the mean over a tenth of the run; None for fewer than two values."""
    values = part.series(key)[1]
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
