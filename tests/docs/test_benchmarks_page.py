"""Generated figures are those of benchmarks/results."""

import importlib.util
import json
import re
import sys

from helpers.pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))  # as it is for a script there
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
    for path in make_benchmarks.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if path.name == "train-zen3-avx2.json":
            found["ratios"]["tokens-per-second/transformers"] += 1
        (tmp_path / path.name).write_text(json.dumps(found))
    monkeypatch.setattr(make_benchmarks, "RESULTS", tmp_path)
    after = make_benchmarks.page().splitlines()
    assert [a for a, b in zip(after, before.splitlines(), strict=True) if a != b] == ["| tokens-per-second | 2.06 |"]


def test_ratios_in_prose_are_those_of_the_results():
    """Bold ratios with two decimals in the design notes; the READMEs' sentence on the GPU."""
    known = set()
    for path in make_benchmarks.RESULTS.glob("*.json"):
        known |= {f"{ratio:.2f}" for ratio in json.loads(path.read_text())["ratios"].values()}
    notes = (ROOT / "docs" / "design-notes.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\*\*(\d+\.\d\d) times", notes)) <= known
    gpu = json.loads((make_benchmarks.RESULTS / "gpu-nvidia-h200.json").read_text())["ratios"]
    prefill = [ratio for name, ratio in gpu.items() if "prefill" in name]
    decode = [ratio for name, ratio in gpu.items() if "prefill" not in name]
    said = [f"{min(decode):.1f} to {max(decode):.1f}", f"{min(prefill):.2f} to {max(prefill):.2f}"]
    english, french = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.fr.md"))
    for words in said:
        assert words in english, words
        assert words.replace(".", ",").replace("to", "à") in french, words
