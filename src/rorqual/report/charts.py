"""Chart drawing: two themes and three chart types, readable on a phone."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE = 4.6, 2.9  # inches: at a phone's width the letters are still 10 pixels high
DPI = 160
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Point = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Theme:
    surface: str
    text: str
    faint: str
    colours: tuple[str, ...]
    ramp: tuple[float, float]  # the range of viridis with enough contrast, for ordered series


THEMES = (
    Theme(
        "#ffffff",
        "#1d2733",
        "#dfe4ea",
        ("#2767c9", "#d95f1e", "#14866a", "#8250c4", "#b8327f", "#7a6a10"),
        (0.05, 0.75),
    ),
    Theme(
        "#171d25", "#dde4ec", "#323c48", ("#6ea8ff", "#f79a63", "#4fd0a5", "#b99cff", "#f285bd", "#d8c65a"), (0.4, 1.0)
    ),
)


def save(plot: Callable[[Axes, Theme], bool], theme: Theme, file: Path) -> bool:
    """Draw with `plot` and write a PNG; returns False, and writes no file, where `plot` had nothing to draw."""
    with matplotlib.rc_context(
        {
            "font.size": 10.5,
            "text.color": theme.text,
            "axes.labelcolor": theme.text,
            "axes.edgecolor": theme.faint,
            "axes.facecolor": theme.surface,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.7,
            "xtick.color": theme.text,
            "ytick.color": theme.text,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "text.parse_math": False,
        }
    ):
        figure = Figure(figsize=SIZE, dpi=DPI, facecolor=theme.surface, layout="constrained")
        drawn = plot(figure.subplots(), theme)
        if drawn:
            figure.savefig(file)
    return drawn


def lines(axes: Axes, theme: Theme, series: Series, smooth: bool, ordered: bool = False) -> None:
    """One line per series. `smooth`: a running mean over a pale line of the data; `ordered`: colours along a ramp."""
    for i, (label, (x, y)) in enumerate(series.items()):
        colour = theme.colours[i % len(theme.colours)]
        if ordered:
            first, last = theme.ramp
            colour = matplotlib.colormaps["viridis"](first + (last - first) * i / max(1, len(series) - 1))
        window = len(y) // 40 if smooth else 0
        if window:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.25)
            y = running_mean(y, window)
        axes.plot(x, y, color=colour, linewidth=1.8, label=label, marker="o" if len(x) < 15 else None, markersize=3.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(axes, theme, len(series))


def errorbars(axes: Axes, theme: Theme, curves: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> None:
    """Lines through points (x, value, low, high), with the intervals as a band."""
    for i, (label, points) in enumerate(curves.items()):
        x, value, low, high = np.array(points, dtype=float).T
        colour = theme.colours[i % len(theme.colours)]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, value, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    _legend(axes, theme, len(curves))


def grouped_bars(
    axes: Axes, theme: Theme, names: Sequence[str], groups: Mapping[str, Mapping[str, Point]], sideways: bool = False
) -> None:
    """For each of `names`, one bar per group that has it, with interval and value."""
    top = max((high for bars in groups.values() for _, _, high in bars.values()), default=1.0)
    for i, (label, bars) in enumerate(groups.items()):
        colour = theme.colours[i % len(theme.colours)]
        for name, (value, low, high) in bars.items():
            members = [other for other in groups if name in groups[other]]
            width = 0.8 / len(members)
            at = names.index(name) + (members.index(label) - (len(members) - 1) / 2) * width
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            error = {"ecolor": theme.text, "error_kw": {"linewidth": 1.1, "capsize": 2.5}}
            named = label if label not in axes.get_legend_handles_labels()[1] else None
            if sideways:
                axes.barh(at, value, 0.9 * width, color=colour, xerr=spread, label=named, **error)
                axes.text(high + 0.02 * top, at, f"{value:.0f}", va="center", fontsize=9.5)
            else:
                axes.bar(at, value, 0.9 * width, color=colour, yerr=spread, label=named, **error)
                axes.text(at, high + 0.02 * top, f"{value:.0f}", ha="center", va="bottom", fontsize=9.5)
    positions = range(len(names))
    if sideways:
        axes.set_yticks(positions, names)
        axes.invert_yaxis()
        axes.set_xlim(0, max(top * 1.12, 1.0))
        axes.grid(axis="y", visible=False)
    else:
        axes.set_xticks(positions, [textwrap.fill(name, 14) for name in names])
        axes.set_ylim(0, max(top * 1.12, 1.0))
        axes.grid(axis="x", visible=False)
        _legend(axes, theme, len(groups))


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over `window` values to each side, fewer near the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    starts, ends = np.maximum(0, at - window), np.minimum(len(values), at + window + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _legend(axes: Axes, theme: Theme, entries: int) -> None:
    if entries > 1:
        handles, labels = axes.get_legend_handles_labels()
        if entries > 6:  # many ordered series: the first and the last give the direction
            handles, labels = [handles[0], handles[-1]], [labels[0], labels[-1]]
        axes.legend(
            handles, labels, frameon=False, fontsize=9.5, labelcolor=theme.text, ncols=min(3, entries),
            handlelength=1.2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2,
        )  # fmt: skip
