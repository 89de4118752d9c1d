"""The plan of one stage of a pipeline, such as a pre-training: time, money, memory, each with where it comes from."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rorqual.model.config import ModelConfig
from rorqual.plan.chips import Chip
from rorqual.plan.cost import cache_bytes_per_token, mtp_parameters, parameters, parameters_by_component
from rorqual.plan.layout import Layout
from rorqual.plan.simulate import Times

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 80 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def totals(seconds: Estimate, hours: Estimate, cost: Estimate | None) -> dict[str, Any]:
    """Chip hours, time and money of --json."""
    return {
        "gpu_hours": hours.value,
        "gpu_hours_interval": [hours.low, hours.high],
        "days": seconds.value / DAY,
        "days_interval": [seconds.low / DAY, seconds.high / DAY],
        "cost_usd": cost and cost.value,
        "cost_usd_interval": cost and [cost.low, cost.high],
    }


@dataclass(frozen=True)
class Rejected:
    """A layout that fits, and why it is slower than the best."""

    layout: Layout
    seconds: float  # of a step
    why: str


@dataclass(frozen=True)
class StagePlan:
    kind: str  # pretrain, sft, rl, …
    name: str
    config: ModelConfig
    chip: Chip
    chips: int
    price: float | None  # $ an hour of a chip
    tokens: float  # trained on, or generated
    flops_per_token: float
    seconds: Estimate
    parts: dict[str, float]  # seconds, which add up to the whole
    memory: dict[str, float]  # bytes of the chip that holds the most, by use
    layout: Layout | None = None
    times: Times | None = None  # of a micro-batch in the layout's pipeline
    micro_batches: int = 1  # of a rank in a step
    rejected: tuple[Rejected, ...] = ()
    assumptions: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)  # more of one kind

    @property
    def chip_hours(self) -> Estimate:
        return self.seconds.times(self.chips / HOUR)

    @property
    def cost(self) -> Estimate | None:
        return None if self.price is None else self.chip_hours.times(self.price)

    @property
    def energy_kwh(self) -> float | None:
        """With all chips at full power; None where it is not known."""
        return self.chip_hours.value * self.chip.watts / 1000 if self.chip.watts else None

    def to_dict(self) -> dict[str, Any]:
        """The object of --json."""
        total, active = parameters(self.config)
        return {
            "kind": self.kind,
            "name": self.name,
            "params": {
                "total": total,
                "active": active,
                "multi_token": mtp_parameters(self.config),
                "by_component": parameters_by_component(self.config),
            },
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "flops": self.tokens * self.flops_per_token,
            "gpu": self.chip.name,
            "gpus": self.chips,
            **totals(self.seconds, self.chip_hours, self.cost),
            "energy_kwh_at_full_power": self.energy_kwh,
            "price_per_gpu_hour": self.price,
            "seconds_by_part": self.parts,
            "memory_per_gpu_bytes": sum(self.memory.values()),
            "memory_by_use_bytes": self.memory,
            "cache_bytes_per_token": cache_bytes_per_token(self.config),
            "layout": self.layout and asdict(self.layout),
            "other_layouts": [asdict(r.layout) | {"seconds_a_step": r.seconds, "why": r.why} for r in self.rejected],
            "assumptions": list(self.assumptions),
            **self.figures,
        }
