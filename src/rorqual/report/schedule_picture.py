"""The pipeline of a plan as inline SVG: a row a rank, a box for each action, at the times simulated for the plan."""

import math
import statistics
from html import escape

from rorqual.plan.layout import Layout, schedule_of
from rorqual.plan.schedule import Action, Kind, Schedule
from rorqual.plan.simulate import Timeline, Times, simulate
from rorqual.plan.stage import StagePlan
from rorqual.plan.step_time import few_micro_batches
from rorqual.report.formatting import percent

WORDS: dict[Kind, str] = {
    "F": "forward", "B": "backward", "I": "backward, gradients of inputs", "W": "backward, gradients of weights",
}  # fmt: skip
WIDTH, LEFT, RIGHT, ROW, GAP, AXIS = 1000.0, 52.0, 16.0, 22.0, 3.0, 26.0  # units of the picture, pixels on a wide page
DIGIT = 5.2  # width of a micro-batch's digit
TICKS = 6


def schedule_picture(plan: StagePlan) -> str:
    """Nothing for a plan without a pipeline. Of many micro-batches the few are drawn that the planner simulates."""
    layout, times = plan.layout, plan.times
    if layout is None or times is None:
        return ""
    drawn = few_micro_batches(layout.pipeline, plan.micro_batches)
    schedule = schedule_of(layout.schedule, layout.pipeline, drawn)
    timeline = simulate(schedule, times)
    name = f"{layout.schedule}: {drawn} micro-batches on {layout.pipeline} ranks in {timeline.length:.3g} s"
    note = _note(plan.micro_batches, schedule, times, timeline, bubble_share(layout, times, plan.micro_batches))
    return (
        f"<h3>Schedule of the pipeline: {escape(layout.schedule)}</h3>"
        f"<div class=scroll>{_svg(schedule, timeline, name)}</div>{_legend(schedule)}<p class=note>{escape(note)}</p>"
    )


def bubble_share(layout: Layout, times: Times, micro_batches: int) -> float:
    """Share of the ranks' time without work, over a whole step."""
    few = few_micro_batches(layout.pipeline, micro_batches)
    timeline = simulate(schedule_of(layout.schedule, layout.pipeline, few), times)
    length, idle = timeline.length, sum(timeline.bubble)
    if few < micro_batches:
        fewer = simulate(schedule_of(layout.schedule, layout.pipeline, few - 1), times)
        more = micro_batches - few
        length, idle = length + more * (length - fewer.length), idle + more * (idle - sum(fewer.bubble))
    return idle / length / layout.pipeline


def _note(micro_batches: int, schedule: Schedule, times: Times, timeline: Timeline, whole: float) -> str:
    """How much is drawn, and the bubble of that and of the whole step."""
    drawn = schedule.micro_batches
    if drawn < micro_batches:
        said = (
            f"Drawn are {drawn} of a step's {micro_batches} micro-batches: as many as the planner simulates, since "
            f"those in the middle are alike. Ranks wait for {percent(timeline.bubble_share)} of the time drawn and for "
            f"{percent(whole)} of a whole step's"
        )
    else:
        said = f"All {drawn} micro-batches of a step. Ranks wait for {percent(whole)} of its time"
    said += ", on average; the bubble above is that of the rank with the most work"
    if times.FB is not None:
        said += ", with the tokens' travel that nothing hides at a step's ends"
    empty = [str(stage) for stage in range(schedule.stages) if times.of((Action("F", stage, 0),)) == 0]
    return f"{said}. Stages without layers take no time: stage {', '.join(empty)}." if empty else f"{said}."


def _svg(schedule: Schedule, timeline: Timeline, name: str) -> str:
    scale = (WIDTH - LEFT - RIGHT) / timeline.length
    number = DIGIT * len(str(schedule.micro_batches - 1)) + 2
    widths = [(end - start) * scale for spans in timeline.spans for start, end in spans]
    numbered = statistics.median(widths) > number  # numbers in a few boxes alone would confuse
    rows = []
    for rank, (steps, spans) in enumerate(zip(schedule.steps, timeline.spans, strict=True)):
        top, first = rank * ROW, schedule.rank_of_stage.index(rank)
        boxes: dict[str, list[str]] = {}
        numbers: list[str] = []
        for step, (start, end) in zip(steps, spans, strict=True):
            x, width, height = LEFT + start * scale, (end - start) * scale, (ROW - GAP) / len(step)
            for i, action in enumerate(step):  # of an overlapped pair the forward is above
                y = top + i * height
                box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"/>'
                boxes.setdefault(_colour(action.kind, action.stage != first), []).append(box)
                if numbered and width > number:
                    at = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 3:.1f}"'
                    numbers.append(f"<text {at}>{action.micro_batch}</text>")
        groups = "".join(f"<g class={colour}>{''.join(found)}</g>" for colour, found in boxes.items())
        rows.append(
            f'<text class=rank x="0" y="{top + ROW / 2 + 3:.1f}">rank {rank}</text>'
            f'<rect class=idle x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{ROW - GAP}"/>'
            f"{groups}<g class=numbers>{''.join(numbers)}</g>"
        )
    height = schedule.ranks * ROW
    return (
        f'<svg class=schedule viewBox="0 0 {WIDTH:.0f} {height + AXIS:.0f}" role=img aria-label="{escape(name)}">'
        f"{''.join(rows)}{_axis(timeline.length, scale, height)}</svg>"
    )


def _axis(length: float, scale: float, top: float) -> str:
    """Ticks at round times; the unit stands at the last."""
    size = 10 ** math.floor(math.log10(length / TICKS))
    step = next(size * factor for factor in (1, 2, 5, 10) if length / (size * factor) <= TICKS)
    ticks = [i * step for i in range(int(length / step) + 1)]
    return "".join(
        f'<path class=tick d="M{LEFT + t * scale:.1f} {top:.0f}v4"/>'
        f'<text class=tick x="{LEFT + t * scale:.1f}" y="{top + 17:.0f}">{t:.3g}{" s" if t == ticks[-1] else ""}</text>'
        for t in ticks
    )


def _legend(schedule: Schedule) -> str:
    used = {action.kind for steps in schedule.steps for step in steps for action in step}
    entries = [f"<li><i class={_colour(kind)}></i><span>{WORDS[kind]}</span></li>" for kind in WORDS if kind in used]
    if schedule.stages > schedule.ranks:
        entries.append("<li><span>darker: the second stage of a rank</span></li>")
    if any(len(step) == 2 for steps in schedule.steps for step in steps):
        entries.append("<li><span>two half boxes: a forward and a backward that overlap</span></li>")
    return f'<ul class="legend inline">{"".join(entries)}</ul>'


def _colour(kind: Kind, second: bool = False) -> str:
    return f"a{kind}{2 if second else ''}"
