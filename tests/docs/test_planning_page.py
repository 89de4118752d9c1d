"""The page has the figures that the planner computes now."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("make_planning", ROOT / "docs" / "make_planning.py")
make_planning = importlib.util.module_from_spec(specification)
specification.loader.exec_module(make_planning)


def test_the_table_is_up_to_date():
    assert make_planning.PAGE.read_text(encoding="utf-8") == make_planning.page(), "run python docs/make_planning.py"
