import os

from rorqual.process_tuning import tune


def test_a_persons_own_setting_stays(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    tune()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    tune()
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
