"""The plan of a whole pipeline: from text to a served model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.plan.stage import Estimate, StagePlan, totals


@dataclass(frozen=True)
class PipelinePlan:
    """Stages that follow each other. A service goes on after them, and is not in the sums."""

    name: str
    stages: tuple[StagePlan, ...]

    @property
    def trained(self) -> tuple[StagePlan, ...]:
        return tuple(stage for stage in self.stages if stage.kind != "serve")

    @property
    def seconds(self) -> Estimate:
        return added([stage.seconds for stage in self.trained])

    @property
    def chip_hours(self) -> Estimate:
        return added([stage.chip_hours for stage in self.trained])

    @property
    def cost(self) -> Estimate | None:
        """None where a stage has no price."""
        costs = [stage.cost for stage in self.trained]
        known = [cost for cost in costs if cost is not None]
        return added(known) if len(known) == len(costs) else None

    def to_dict(self) -> dict[str, Any]:
        """The object of --json."""
        sums = totals(self.seconds, self.chip_hours, self.cost)
        return {"name": self.name, **sums, "stages": [stage.to_dict() for stage in self.stages]}


def added(estimates: Sequence[Estimate]) -> Estimate:
    """With the ends of the intervals: the stages share their calibration, so its error does not average out."""
    return Estimate(
        sum(e.value for e in estimates), sum(e.low for e in estimates), sum(e.high for e in estimates)
    )  # fmt: skip
