import json

import pytest
import torch

from rorqual.plan.hardware import describe_machine, matrix_peak, memory_total, memory_used
from rorqual.plan.ledger import Ledger


def test_ledger_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr("rorqual.plan.ledger.matrix_peak", lambda dtype: 100.0)
    ledger = Ledger(tmp_path, {"seconds": 5.0})
    ledger.add("pretrain", tokens=10, flops=300, seconds=4.0)
    ledger.add("rl", tokens=1, flops=50, seconds=1.0)
    ledger.add("rl", tokens=2, flops=50, seconds=1.0)
    account = json.loads(ledger.write().read_text())
    assert account["stages"]["rl"] == {"tokens": 3, "flops": 100, "seconds": 2.0, "utilisation": 0.5}
    assert account["total"] == pytest.approx({"tokens": 13, "flops": 400, "seconds": 6.0, "utilisation": 4 / 6})
    assert account["predicted"] == {"seconds": 5.0}
    assert account["machine"]["matrix_peak_flops"] == 100.0
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_a_stage_without_time_has_no_utilisation(tmp_path):
    ledger = Ledger(tmp_path, {})
    ledger.add("pretrain", tokens=0, flops=0, seconds=0)
    assert ledger.to_dict()["total"]["utilisation"] == 0


def test_matrix_peak_is_measured_once():
    first = matrix_peak(torch.float32)
    assert 1e8 < first < 1e16
    assert matrix_peak(torch.float32) == first


def test_machine():
    assert describe_machine()["cores"] >= 1
    assert 0 < memory_used() < memory_total()
