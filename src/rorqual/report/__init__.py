"""`rorqual report`: one page with pictures that explains a run to someone who was not there."""

from pathlib import Path

from rorqual.errors import file_error
from rorqual.extras import require
from rorqual.files import write_text
from rorqual.report.run_record import read_run

__all__ = ["write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write report.html (self-contained) and figures/*.png from what the run left in its folder.

    Reads metrics.jsonl here and in sub-runs, ledger.json, summary.json and recipe.toml; parts that are missing are
    left out. Raises UserError when the folder does not exist, holds nothing to report or broken JSON, or cannot be
    written.
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
