"""Pictures of pipeline schedules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rorqual.errors import file_error
from rorqual.extras import require
from rorqual.plan.schedule import Action, Kind, Schedule
from rorqual.plan.simulate import Timeline

COLOURS: dict[Kind, tuple[str, str]] = {  # of a rank's first stage, and of its second
    "F": ("#bcd3ef", "#86aede"),
    "B": ("#c3e0c0", "#8fc48c"),
    "I": ("#f3dcae", "#e0b765"),
    "W": ("#ddcdea", "#b99bd2"),
}
WORDS = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
TEXT, IDLE = "#1d2733", "#f1f3f5"
WIDTH, DPI = 10.0, 160  # inches, dots per inch
LETTER = 0.065  # inches that a digit takes


def draw(timelines: Mapping[str, tuple[Schedule, Timeline]], path: str | Path) -> None:
    """Write a PNG, 1600 pixels wide: a panel per schedule, all on one axis of time, with a row per rank.

    Cells as wide as a number bear that of the micro-batch. An overlapped pair is two halves, the forward above.
    Raises MissingExtra without Matplotlib, UserError where the file cannot be written.
    """
    require("report")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedules = [schedule for schedule, _ in timelines.values()]
    rows = [schedule.ranks for schedule in schedules]
    length = max(timeline.length for _, timeline in timelines.values())
    height = 0.3 * sum(rows) + 0.45 * len(rows) + 0.75
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for axes, (title, (schedule, timeline)) in zip(panels, timelines.items(), strict=True):
        heading = f"{title}: {timeline.length:.4g} s, bubble {100 * timeline.bubble_share:.3g} %"
        axes.set_title(heading, loc="left", fontsize=10, color=TEXT)
        axes.set(xlim=(0, length), ylim=(schedule.ranks, 0))
        axes.set_yticks([rank + 0.5 for rank in range(schedule.ranks)], [f"rank {r}" for r in range(schedule.ranks)])
        axes.tick_params(length=0, labelsize=8, labelcolor=TEXT)
        axes.spines[:].set_visible(False)
        number = LETTER * len(str(schedule.micro_batches - 1)) / (WIDTH - 0.8) * length  # seconds that one takes
        for rank, (steps, spans) in enumerate(zip(schedule.steps, timeline.spans, strict=True)):
            axes.barh(rank + 0.5, timeline.length, height=0.9, color=IDLE)
            first = min(action.stage for step in steps for action in step)
            for step, (start, end) in zip(steps, spans, strict=True):
                part = 0.9 / len(step)
                for i, action in enumerate(step):
                    middle = rank + 0.05 + part * (i + 0.5)
                    _cell(axes, action, action.stage != first, start, end - start, middle, part, number)
    panels[-1].set_xlabel("seconds", fontsize=8, color=TEXT)
    used = {action.kind for schedule in schedules for steps in schedule.steps for step in steps for action in step}
    marks = [Patch(color=COLOURS[kind][0], label=f"{kind}: {WORDS[kind]}") for kind in COLOURS if kind in used]
    if any(schedule.stages > schedule.ranks for schedule in schedules):
        marks.append(Patch(color="#9aa3ad", label="darker: the rank's second stage"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    try:
        figure.savefig(path, format="png", pil_kwargs={"optimize": True})
    except OSError as e:
        raise file_error(path, e) from None


def _cell(
    axes: Any, action: Action, second: bool, start: float, width: float, middle: float, height: float, number: float
) -> None:
    from matplotlib.patches import Rectangle

    colour = COLOURS[action.kind][second]
    axes.add_patch(Rectangle((start, middle - height / 2), width, height, fc=colour, ec="white", lw=0.8))
    text, size = str(action.micro_batch), 6.5 if height < 0.5 else 7.5
    if width > number:
        axes.text(start + width / 2, middle, text, ha="center", va="center_baseline", fontsize=size, color=TEXT)
