"""A short speedrun left what it promises: python .ci/check_speedrun.py RUN"""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
names = [stage["name"] for stage in summary["stages"]]
assert names == ["pretrain", "rl", "distill"][: len(names)], names
assert "rl" in names or any("--minutes" in note for note in summary["notes"]), "it ended early and did not say so"
for stage in summary["stages"]:
    for family, result in stage["tasks"].items():
        low, high = result["interval"]
        assert 0 <= low <= result["pass_at_1"] <= high <= 1, (family, result)
for family, gain in summary["gains"].get("rl", {}).items():
    assert gain["interval"][1] >= 0, f"{family}: reinforcement learning made it worse: {gain}"
lines = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in lines if "loss" in line]
assert losses[-1] < 0.5 * losses[0], f"pre-training learnt nothing: loss {losses[0]} to {losses[-1]}"
page = (run / "report.html").read_text()
assert all(word in page for word in ("countdown", "chain_sum", "<img", "MaxVio")), "the report lacks a part"
assert len(list((run / "figures").glob("*.png"))) >= 6
seconds = summary["total_seconds"]
print(f"{run}: {', '.join(names)} in {seconds:.0f} s of {60 * summary['minutes']:.0f}; the report is complete")
