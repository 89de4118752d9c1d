"""Energy by the processors' counters."""

import pytest

from rorqual.plan.energy import EnergyMeter


def zone(folder, name, microjoules, limit=10**9):
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", limit)):
        (folder / file).write_text(f"{value}\n")


def test_processors_are_added_and_their_parts_are_not(tmp_path):
    zone(tmp_path / "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path / "intel-rapl:1", "package-1", 1_000_000)
    zone(tmp_path / "intel-rapl:0:0", "core", 7)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0
    zone(tmp_path / "intel-rapl:0", "package-0", 8_000_000)
    zone(tmp_path / "intel-rapl:1", "package-1", 2_500_000)
    zone(tmp_path / "intel-rapl:0:0", "core", 2_000_000)
    assert meter.joules() == pytest.approx(4.5)
    assert meter.joules() == pytest.approx(4.5)


def test_a_counter_begins_again_at_its_limit(tmp_path):
    zone(tmp_path / "intel-rapl:0", "package-0", 9_000_000, 10_000_000)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path / "intel-rapl:0", "package-0", 2_000_000, 10_000_000)
    assert meter.joules() == pytest.approx(3)


def test_a_machine_that_does_not_tell(tmp_path):
    assert EnergyMeter(tmp_path / "none").joules() is None
    zone(tmp_path / "intel-rapl:0", "package-0", "")
    assert EnergyMeter(tmp_path).joules() is None
