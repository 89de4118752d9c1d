"""Writes the tables of five-million.md and draws its picture: python docs/make_five_million.py"""

from pathlib import Path

from rorqual.cli.plan_stages import plan_files
from rorqual.plan.pipeline_plan import PipelinePlan, added
from rorqual.plan.plan_text import time_said
from rorqual.plan.quantity import quantity
from rorqual.plan.stage import Estimate

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "five-million.md", ROOT / "docs" / "figures" / "five-million.png"
PIPELINE = ROOT / "recipes" / "pipelines" / "deepseek-r1.toml"
# H800 hours (arXiv 2412.19437, table 1; Nature 2025, supplement), and the stages of the pipeline that they are of.
PUBLISHED = {
    "V3, pre-training": (2664e3, ("V3, pre-training",)),
    "V3, longer context": (119e3, ("V3, context of 32 K", "V3, context of 128 K")),
    "V3, post-training": (5e3, ("V3, fine-tuning",)),
    "R1-Zero": (101e3, ("R1-Zero, 32 K", "R1-Zero, 64 K")),
    "R1, its data": (5e3, ("R1, its data",)),
    "R1": (41e3, ("R1, fine-tuning", "R1, RL")),
}
PRICE, CHIPS, YEAR = 2.0, 2048, 365 * 24
TODAY = (("h800", 2048), ("h100", 2048), ("h200", 2048), ("b200", 1024))


def plan(gpu: str | None = None, gpus: int | None = None) -> PipelinePlan:
    given = {name: value for name, value in (("gpu", gpu), ("gpus", gpus)) if value is not None}
    found = plan_files([str(PIPELINE)], given, None)
    assert isinstance(found, PipelinePlan)
    return found


def hours_of(found: PipelinePlan, names: tuple[str, ...]) -> Estimate:
    return added([stage.chip_hours for stage in found.stages if stage.name in names])


def stages_table(found: PipelinePlan) -> str:
    rows = ["| H800 hours | published | predicted (80 %) | error | at $2 |", "|---|---|---|---|---|"]
    for name, (published, stages) in PUBLISHED.items():
        ours = hours_of(found, stages)
        rows.append(
            f"| {name} | {quantity(published)} | {_range(ours)} | {ours.value / published - 1:+.0%} | "
            f"${quantity(PRICE * published)} |"
        )
    published, ours = sum(hours for hours, _ in PUBLISHED.values()), found.chip_hours
    rows.append(
        f"| **in all** | **{quantity(published)}** | **{_range(ours)}** | {ours.value / published - 1:+.0%} | "
        f"**${quantity(PRICE * published)}** |"
    )
    return "\n".join(rows)


def today_table() -> str:
    """V3's pre-training alone, with its own layout search on each chip."""
    rows = ["| chips | days | chip hours | an hour | cost (80 %) |", "|---|---|---|---|---|"]
    for gpu, chips in TODAY:
        stage = next(s for s in plan(gpu, chips).stages if s.name == "V3, pre-training")
        cost = stage.cost
        assert cost is not None
        rows.append(
            f"| {chips:,} × {stage.chip.name.removeprefix('NVIDIA ')} | {time_said(stage.seconds, False)} | "
            f"{quantity(stage.chip_hours.value)} | ${stage.price:.2f} | ${_range(cost)} |"
        )
    return "\n".join(rows)


def _range(value: Estimate) -> str:
    return f"{quantity(value.value)} ({quantity(value.low)} to {quantity(value.high)})"


def _put(text: str, name: str, table: str) -> str:
    start, end = f"<!-- {name}: written by docs/make_five_million.py -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def page(found: PipelinePlan) -> str:
    return _put(PAGE.read_text(encoding="utf-8"), "stages", stages_table(found))


def draw(found: PipelinePlan) -> None:
    """Left: hours published and predicted, on a logarithmic axis. Right: what the figure is part of, in dollars."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), gridspec_kw={"width_ratios": [3, 2]})
    names = list(PUBLISHED)[::-1]
    for y, name in enumerate(names):
        published, stages = PUBLISHED[name]
        ours = hours_of(found, stages)
        left.plot([ours.low, ours.high], [y, y], color="#4477aa", linewidth=5, alpha=0.45, solid_capstyle="butt")
        left.plot(ours.value, y, "o", color="#4477aa", label="predicted, with 80 %" if y == 0 else None)
        left.plot(published, y, "D", color="#cc3311", markersize=6, label="published" if y == 0 else None)
    left.set_yticks(range(len(names)), names)
    left.set_xscale("log")
    left.set_xlabel("H800 hours")
    left.grid(axis="x", color="#dddddd")
    left.set_axisbelow(True)
    left.legend(loc="lower right", frameon=False)
    v3 = PRICE * sum(hours for name, (hours, _) in PUBLISHED.items() if name.startswith("V3")) / 1e6
    r1 = PRICE * sum(hours for name, (hours, _) in PUBLISHED.items() if name.startswith("R1")) / 1e6
    bars = {
        "V3's final run\n(“5.6 million”)": v3, "R1 on top of it": r1, f"{CHIPS} H800 for a year\nat the same $2": (
            PRICE * CHIPS * YEAR / 1e6)
    }  # fmt: skip
    for y, (name, millions) in enumerate(reversed(bars.items())):
        right.barh(y, millions, color="#4477aa" if "year" not in name else "#bbbbbb", height=0.55)
        right.text(millions + 0.6, y, f"${millions:.2f} M" if millions < 10 else f"${millions:.1f} M", va="center")
    right.set_yticks(range(len(bars)), list(bars)[::-1])
    right.set_xlim(0, 45)
    right.set_xlabel("million $")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    plt.tight_layout()
    plt.savefig(PICTURE, dpi=110)
    plt.close()


if __name__ == "__main__":
    whole = plan()
    PAGE.write_text(_put(page(whole), "today", today_table()), encoding="utf-8")
    draw(whole)
