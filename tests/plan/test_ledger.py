import json

import pytest
import torch

from rorqual.errors import UserError
from rorqual.plan.hardware import describe_machine, matrix_peak, memory_total, memory_used
from rorqual.plan.ledger import Ledger, predicted_at_start, read_accounts


def test_ledger_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr("rorqual.plan.ledger.matrix_peak", lambda dtype, device: 100.0)
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


def test_a_prediction_is_that_of_the_start(tmp_path):
    """A run that resumes keeps it; one of an earlier version has none; a new start makes a new one."""
    assert predicted_at_start(tmp_path, lambda: {"seconds": 1.0}, begins=False) == {}
    assert predicted_at_start(tmp_path, lambda: {"seconds": 5.0}, begins=True) == {"seconds": 5.0}
    assert predicted_at_start(tmp_path, lambda: {"seconds": 9.0}, begins=False) == {"seconds": 5.0}
    assert predicted_at_start(tmp_path, lambda: {"seconds": 7.0}, begins=True) == {"seconds": 7.0}


def write(folder, seconds, predicted):
    folder.mkdir(parents=True)
    total = {"tokens": 1000, "flops": 2e6, "seconds": seconds, "utilisation": 0.25}
    (folder / "ledger.json").write_text(json.dumps({"stages": {"rl": total}, "total": total, "predicted": predicted}))


def test_accounts_of_several_runs(tmp_path):
    write(tmp_path / "a", 10.0, {"tokens_per_second": 110.0, "tokens_per_second_interval": [90.0, 130.0]})
    write(tmp_path / "b" / "pretrain", 20.0, {"tokens_per_second": 100.0, "tokens_per_second_interval": [80, 120]})
    write(tmp_path / "c", 5.0, {})
    one, two, three = read_accounts(tmp_path)
    assert (one.run, two.run) == ("a", "b/pretrain")
    assert (one.measured, one.inside) == (100.0, True)
    assert one.error == pytest.approx(100 / 110 - 1)  # it took a tenth longer than predicted
    assert (two.inside, two.error) == (False, pytest.approx(-0.5))
    assert (three.predicted, three.error, three.inside) == (None, None, None)
    assert read_accounts(tmp_path / "a")[0].run == "a"


def test_steps_are_scored_by_their_time(tmp_path, monkeypatch):
    """A longer time than predicted is a negative error, as with speeds."""
    monkeypatch.setattr("rorqual.plan.ledger.matrix_peak", lambda dtype, device: 100.0)
    predicted = {"tokens_per_second": 1.0, "seconds_a_step": 3.0, "seconds_a_step_interval": [2.0, 5.0]}
    ledger = Ledger(tmp_path, predicted)
    ledger.add("rollout", tokens=100, flops=1, seconds=40.0)
    ledger.measured["seconds_a_step"] = 4.0
    ledger.write()
    (account,) = read_accounts(tmp_path)
    assert (account.unit, account.measured, account.predicted) == ("s a step", 4.0, 3.0)
    assert (account.error, account.inside) == (-0.25, True)


def test_a_part_of_a_run_counts_once(tmp_path):
    for folder in ("whole", "whole/pretrain", "other/pretrain"):
        write(tmp_path / folder, 10.0, {})
    assert {a.run: a.counted for a in read_accounts(tmp_path)} == {
        "other/pretrain": False, "whole": False, "whole/pretrain": True
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["{", "[]", '{"total": {}}', '{"total": 1, "stages": {}}'])
def test_a_damaged_ledger_is_named(tmp_path, damage):
    (tmp_path / "ledger.json").write_text(damage)
    with pytest.raises(UserError, match=r"ledger\.json"):
        read_accounts(tmp_path)


def test_no_ledgers(tmp_path):
    with pytest.raises(UserError, match=r"holds no ledger\.json"):
        read_accounts(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_accounts(tmp_path / "nowhere")
