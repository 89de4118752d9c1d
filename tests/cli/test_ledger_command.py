import json
import sys

import pytest

from rorqual.cli import entry


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["rorqual", "ledger", *words])
    with pytest.raises(SystemExit):
        entry.main()
    return capsys.readouterr()


def test_runs_are_listed_and_summed_up(tmp_path, monkeypatch, capsys):
    for name, seconds in (("fast", 3600.0), ("slow", 7200.0)):
        (tmp_path / name).mkdir()
        total = {"tokens": 3.6e6, "flops": 1e12, "seconds": seconds, "utilisation": 0.25}
        predicted = {"tokens_per_second": 1000.0, "tokens_per_second_interval": [800.0, 1250.0]}
        ledger = {"stages": {"pretrain": total}, "total": total, "predicted": predicted}
        (tmp_path / name / "ledger.json").write_text(json.dumps(ledger))
    out, _ = run(monkeypatch, capsys, str(tmp_path), "--price", "2")
    assert "1 of 2 predictions held" in out
    assert "$6.00 at $2 an hour." in out
    assert "3:00:00" in out
    assert "-50%" in out
    out, _ = run(monkeypatch, capsys, str(tmp_path), "--price", "2", "--json")
    found = json.loads(out)
    assert found["total"] == {"tokens": 7.2e6, "flops": 2e12, "seconds": 10800.0, "cost_usd": 6.0}
    assert found["within_interval"] == 0.5
    assert [r["inside"] for r in found["runs"]] == [True, False]


def test_nothing_to_list(tmp_path, monkeypatch, capsys):
    _, err = run(monkeypatch, capsys, str(tmp_path))
    assert err == f"rorqual: {tmp_path} holds no ledger.json; runs write it when they end\n"
