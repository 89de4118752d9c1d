"""Tables are cut to a terminal's width, and not where the output goes to a file."""

import pytest
from rich.table import Table

from rorqual.console import output

NAME = "/home/somebody/a-long-way/to/an/environment.py:" + "Numerals" * 12


@pytest.mark.parametrize(
    ("variables", "whole"), [({}, True), ({"FORCE_COLOR": "1"}, False), ({"COLUMNS": "60"}, False)]
)
def test_long_names(monkeypatch, capsys, variables, whole):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    table = Table("task", "pass@1", title="results")
    table.add_row(NAME, "0.5")
    output().print(table)
    out = capsys.readouterr().out
    assert (NAME in out) == whole
    assert max(map(len, out.splitlines())) < 300  # as wide as it needs, no wider
