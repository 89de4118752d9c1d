"""Energy that this machine's processors have used, where their counters (RAPL, of Intel and AMD) may be read."""

from dataclasses import dataclass, field
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")
PACKAGE = "package-"  # the zones of whole processors; cores and memory within them are not counted twice


@dataclass
class EnergyMeter:
    """Counts from when it is made. Other work on the machine is in it."""

    counters: Path = COUNTERS
    _last: dict[Path, int] = field(default_factory=dict, init=False)
    _microjoules: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self._read()

    def joules(self) -> float | None:
        """So far; None where the machine does not tell. Call it within an hour: counters begin again at a limit."""
        for zone, now in self._read().items():
            before = self._last.get(zone, now)
            self._microjoules += now - before if now >= before else now + _limit(zone) - before
            self._last[zone] = now
        return self._microjoules / 1e6 if self._last else None

    def _read(self) -> dict[Path, int]:
        found: dict[Path, int] = {}
        for zone in self.counters.glob("*:*"):
            try:
                if (zone / "name").read_text().startswith(PACKAGE):
                    found[zone] = int((zone / "energy_uj").read_text())
            except (OSError, ValueError):  # in most containers, and for users other than root
                continue
        return found


def _limit(zone: Path) -> int:
    try:
        return int((zone / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return 0
