"""Steps of small models are timed; which times come out is the machine's affair."""

import pytest

from rorqual.plan.cpu_time import step_counts
from rorqual.train import calibrate as module
from rorqual.train.calibrate import calibrate, models


def test_costs_come_from_real_steps(monkeypatch):
    few = [m for i, m in enumerate(models()) if i in (0, 1, 6, 11)]
    monkeypatch.setattr(module, "models", lambda: iter(few))
    monkeypatch.setattr(module, "SECONDS", 0.0)
    said = []
    costs = calibrate(say=said.append)
    assert len(said) == module.ROUNDS
    assert "calibrated on" in costs.source
    for config, rows, length, pieces, optimizer in few:
        counts = step_counts(config, [(rows, length)] * pieces, 4, ahead=True, muon=optimizer == "muon")
        assert costs.seconds(counts) > 0


def test_models_differ_in_every_count():
    """Or a cost could not be told from another."""
    counts = [step_counts(c, [(r, n)] * p, 4, ahead=True, muon=o == "muon") for c, r, n, p, o in models()]
    for name in vars(counts[0]):
        values = [getattr(c, name) for c in counts]
        assert max(values) > 5 * max(1, min(values)) or name in ("experts", "orthogonalised")
    assert len(counts) > len(vars(counts[0]))


@pytest.mark.slow
def test_steps_of_other_models_are_predicted():
    """Within a half: a busy machine may be that much slower for a while."""
    costs = calibrate(say=lambda _: None)
    config = module._mixture(192, 4, 16, 3, 96)
    probe = module.Probe(config, 8, 128, 1, "adamw")
    probe.time()
    assert costs.seconds(probe.counts) == pytest.approx(probe.seconds, rel=0.5)
