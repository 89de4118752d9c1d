"""Writes the table of published runs into planning.md: python docs/make_planning.py"""

import textwrap
from pathlib import Path

from rorqual.plan.published_runs import calibration, published_runs
from rorqual.plan.training_plan import said

PAGE = Path(__file__).parent / "planning.md"
START, END = "<!-- published: written by docs/make_planning.py -->", "<!-- /published -->"


def table() -> str:
    rows = ["| run | chip | layout | published | predicted | error | |", "|---|---|---|---|---|---|---|"]
    for run in published_runs():
        ours = run.predicted(calibration(run.chip.family).utilisation)
        rows.append(
            f"| {run.name} | {run.chip.name.removeprefix('NVIDIA ')} | {said(run.layout)} | {run.tokens_a_second:,.0f} "
            f"| {ours:,.0f} | {ours / run.tokens_a_second - 1:+.0%} | {'fitted' if run.fitted else 'tested'} |"
        )
    sources = "; ".join(f"{run.name}: {run.source}" for run in published_runs())
    return "\n".join(rows) + f"\n\nSources. {_wrapped(sources)}."


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 118))


def page() -> str:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
