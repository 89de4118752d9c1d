"""`rorqual report`: one self-contained HTML page with the figures of a run."""

from pathlib import Path

from rorqual.errors import file_error
from rorqual.extras import require
from rorqual.files import write_text
from rorqual.report.run_record import read_run

__all__ = ["write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write report.html (self-contained) and figures/*.png into the run's folder; returns report.html.

    Reads metrics.jsonl of the run and its sub-runs, ledger.json, summary.json and recipe.toml, as far as they exist.
    Raises UserError when the folder does not exist, has nothing to report or invalid JSON, or cannot be written.
    """
    require("report")
    from rorqual.report.html import render
    from rorqual.report.plots import draw_all

    run = read_run(Path(run_dir))
    page = run.path / "report.html"
    try:
        text = render(run, draw_all(run, run.path / "figures"))
    except OSError as e:
        raise file_error(e.filename or run.path / "figures", e) from None
    write_text(page, text)
    return page
