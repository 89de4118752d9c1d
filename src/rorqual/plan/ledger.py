"""The ledger of a run: measured tokens, FLOPs and seconds of each stage, beside the predicted ones."""

from collections.abc import Mapping
from pathlib import Path

import torch

from rorqual import strict_json
from rorqual.files import write_text
from rorqual.plan.hardware import describe_machine, matrix_peak


class Ledger:
    """Collects the stages' costs and writes run_dir/ledger.json."""

    def __init__(self, run_dir: Path, predicted: Mapping[str, object], dtype: torch.dtype = torch.float32) -> None:
        """`predicted`: the planner's tokens, flops, seconds … before the run.

        `dtype`: compute dtype of the run, whose measured peak the utilisation is relative to.
        """
        self.path, self.predicted, self.dtype = Path(run_dir) / "ledger.json", predicted, dtype
        self.stages: dict[str, dict[str, float]] = {}

    def add(self, stage: str, *, tokens: float, flops: float, seconds: float) -> None:
        """Add to a stage's account; may be called many times."""
        account = self.stages.setdefault(stage, {"tokens": 0, "flops": 0, "seconds": 0})
        for key, value in (("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            account[key] += value

    def to_dict(self) -> dict[str, object]:
        """Stages and total: tokens, FLOPs, seconds, and utilisation (FLOP/s over the measured matmul peak)."""
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
        """Write ledger.json atomically. Raises UserError."""
        write_text(self.path, strict_json.dumps(self.to_dict(), indent=2) + "\n", then="then continue with --resume")
        return self.path
