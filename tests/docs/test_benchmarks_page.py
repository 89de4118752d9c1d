"""Generated figures are those of benchmarks/results."""

import importlib.util

from helpers.pages import ROOT

specification = importlib.util.spec_from_file_location("make_benchmarks", ROOT / "docs" / "make_benchmarks.py")
make_benchmarks = importlib.util.module_from_spec(specification)
specification.loader.exec_module(make_benchmarks)


def test_pages_are_as_the_results_are():
    for path, text in make_benchmarks.pages().items():
        now = path.read_text(encoding="utf-8")
        assert now == text, f"{path.name} is not what benchmarks/results says; run python docs/make_benchmarks.py"


def test_every_result_is_shown():
    known = {f"{b}-{c}.json" for b in make_benchmarks.BENCHMARKS for c in make_benchmarks.CLASSES}
    assert {p.name for p in make_benchmarks.RESULTS.glob("*.json")} <= known


def test_another_result_changes_the_page(tmp_path, monkeypatch):
    before = make_benchmarks.page()
    for path in make_benchmarks.RESULTS.glob("train-*.json"):
        (tmp_path / path.name).write_text(path.read_text().replace('"tokens-per-second/transformers": ', "&9"[:0] +
                                                                   '"tokens-per-second/transformers": 9'))  # fmt: skip
    monkeypatch.setattr(make_benchmarks, "RESULTS", tmp_path)
    assert make_benchmarks.page() != before
