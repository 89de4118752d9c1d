"""The account of a run: what each stage took, beside what the planner had said."""

from pathlib import Path
from typing import Any

import torch

from rorqual import strict_json
from rorqual.files import write_text
from rorqual.plan.hardware import describe_machine, matrix_peak


class Ledger:
    """Gathers stages and writes run_dir/ledger.json."""

    def __init__(self, run_dir: Path, predicted: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        """`predicted`: what was expected beforehand, in the same words (tokens, flops, seconds …).

        `dtype`: what the run computes in, for the peak that utilisation is measured against.
        """
        self.path, self.predicted, self.dtype = Path(run_dir) / "ledger.json", predicted, dtype
        self.stages: dict[str, dict[str, float]] = {}

    def add(self, stage: str, *, tokens: float, flops: float, seconds: float) -> None:
        """Add to a stage's account; a stage may be added to many times."""
        account = self.stages.setdefault(stage, {"tokens": 0, "flops": 0, "seconds": 0})
        for key, value in (("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            account[key] += value

    def to_dict(self) -> dict[str, Any]:
        """Stages and their total with tokens, FLOPs, seconds, and utilisation: FLOPs over the measured matrix peak."""
        peak = matrix_peak(self.dtype)
        total = {key: sum(s[key] for s in self.stages.values()) for key in ("tokens", "flops", "seconds")}
        accounts = {
            name: account | {"utilisation": account["flops"] / (peak * account["seconds"]) if account["seconds"] else 0}
            for name, account in {**self.stages, "total": total}.items()
        }
        return {
            "stages": {name: a for name, a in accounts.items() if name != "total"},
            "total": accounts["total"],
            "predicted": self.predicted,
            "machine": describe_machine() | {"matrix_peak_flops": peak},
        }

    def write(self) -> Path:
        """Write ledger.json whole or not at all."""
        write_text(self.path, strict_json.dumps(self.to_dict(), indent=2) + "\n", then="then continue with --resume")
        return self.path
