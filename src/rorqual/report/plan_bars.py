"""Bars of the plan page as inline SVG. They stretch with the page, so their labels stand beside them in HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rorqual.plan.stage import Estimate

SPAN = 1000.0  # of a bar's viewBox: the whole
HEIGHT = 28


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar; `colour` is a class of the style sheet, `said` the value in words."""

    label: str
    value: float
    colour: str
    said: str
    more: str = ""  # beside it in grey


@dataclass(frozen=True)
class Row:
    """A bar with its interval."""

    label: str
    value: Estimate
    said: str
    interval: str


def stacked(segments: Sequence[Segment], whole: float, what: str) -> str:
    """Segments side by side, on a scale that ends with `whole`, or with their sum if that is more, and their legend.

    What lies beyond `whole` has a red frame, and a line stands where it begins.
    """
    total = sum(segment.value for segment in segments)
    scale, x, boxes = SPAN / max(whole, total), 0.0, []
    for segment in segments:
        width = segment.value * scale
        title = escape(f"{segment.label}: {segment.said}")
        boxes.append(
            f'<rect class={segment.colour} x="{x:.3f}" width="{width:.3f}" height="{HEIGHT}">'
            f"<title>{title}</title></rect>"
        )
        x += width
    if total > whole * (1 + 1e-9):
        edge = whole * scale
        boxes.append(
            f'<rect class=over x="{edge:.3f}" width="{SPAN - edge:.3f}" height="{HEIGHT}"/>'
            f'<path class=limit d="M{edge:.3f} 0V{HEIGHT}"/>'
        )
    label = escape(f"{what}: " + ", ".join(f"{s.label} {s.said}" for s in segments))
    return f"{_svg('stack', label, ''.join(boxes))}{legend(segments)}"


def legend(segments: Sequence[Segment]) -> str:
    entries = "".join(
        f"<li><i class={s.colour}></i><span>{escape(s.label)}</span><b>{escape(s.said)}</b>"
        f"<small>{escape(s.more)}</small></li>"
        for s in segments
    )
    return f"<ul class=legend>{entries}</ul>"


def with_intervals(rows: Sequence[Row]) -> str:
    """One bar a row, all on one scale from zero, each with the ends of its interval."""
    scale = SPAN / max((row.value.high for row in rows), default=1.0)
    found = []
    for row in rows:
        value, low, high = (scale * x for x in (row.value.value, row.value.low, row.value.high))
        high = min(high, SPAN - 2)  # the stroke of its end would be cut
        drawn = (
            f'<rect class=value x="0" y="3" width="{value:.3f}" height="{HEIGHT - 6}"/>'
            f'<path class=whisker d="M{low:.3f} 8V20M{low:.3f} 14H{high:.3f}M{high:.3f} 8V20"/>'
        )
        label = escape(f"{row.label}: {row.said}, {row.interval}")
        found.append(
            f"<div class=row><span>{escape(row.label)}</span>{_svg('interval', label, drawn)}"
            f"<span><b>{escape(row.said)}</b> <small>({escape(row.interval)})</small></span></div>"
        )
    return f"<div class=rows>{''.join(found)}</div>"


def _svg(name: str, label: str, content: str) -> str:
    return (
        f'<svg class="bar {name}" viewBox="0 0 {SPAN:.0f} {HEIGHT}" preserveAspectRatio=none role=img '
        f'aria-label="{label}">{content}</svg>'
    )
