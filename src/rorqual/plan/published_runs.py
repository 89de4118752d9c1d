"""Published training runs, and the utilisation of chip families that follows from some of them."""

import math
import statistics
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from rorqual.model.config import ModelConfig
from rorqual.plan.chips import Chip, find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Job, Layout
from rorqual.plan.step_time import IMBALANCE, step_time

Z80 = 1.2816  # of a normal distribution: 80 % lie within as many standard deviations
UNKNOWN = 0.35  # standard deviation of the logarithm for a family without a published run
LEAST = 0.1  # the same at least, since few runs agree by chance
RUN_FAMILY = "hopper"  # whose utilisation the others take where they have no run


@dataclass(frozen=True)
class PublishedRun:
    """A run of runs.toml."""

    name: str
    fitted: bool
    job: Job
    layout: Layout
    chip: Chip
    tokens_a_second: float  # of a chip
    imbalance: float
    source: str

    def predicted(self, utilisation: float) -> float:
        """Tokens a second of a chip."""
        seconds = step_time(self.job, self.layout, self.chip, utilisation, self.imbalance).total
        return self.job.batch * self.job.length / seconds / self.layout.chips

    def fit(self) -> float:
        """The utilisation with which the prediction is right."""
        found = 0.5
        for _ in range(8):  # Newton's method, as if all of the time went into products
            found = min(1.0, found * self.tokens_a_second / self.predicted(found))
        return found


@dataclass(frozen=True)
class Calibration:
    utilisation: float  # of the peak of products, when nothing else is waited for
    spread: float  # standard deviation of the logarithm of a time
    source: str

    def interval(self, value: float) -> tuple[float, float]:
        """80 % around a time or a cost."""
        factor = math.exp(Z80 * self.spread)
        return value / factor, value * factor


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    found = []
    for raw in tomllib.loads(files("rorqual.plan").joinpath("runs.toml").read_text())["run"]:
        chip, model = find_chip(raw["chip"]), raw["model"]
        config = find_model(model) if isinstance(model, str) else ModelConfig(**model)
        job = Job(config, raw["length"], raw["batch"], moments=raw.get("moments", "float32"))
        layout = Layout(**({"per_node": chip.per_node} | raw["layout"]))
        rate, imbalance = raw["tokens_a_second"], raw.get("imbalance", IMBALANCE)
        found.append(PublishedRun(raw["name"], raw["use"] == "fit", job, layout, chip, rate, imbalance, raw["source"]))
    return tuple(found)


@cache
def calibration(family: str) -> Calibration:
    """Of a chip family: the geometric mean of the runs to fit, and the spread of all, of which 80 % lie within."""
    runs = [run for run in published_runs() if run.chip.family == family]
    fitted = [run for run in runs if run.fitted]
    if not fitted:
        other = calibration(RUN_FAMILY)
        return Calibration(other.utilisation, UNKNOWN, f"no published run of {family}; as {RUN_FAMILY}")
    utilisation = math.exp(statistics.mean(math.log(run.fit()) for run in fitted))
    errors = sorted(abs(math.log(run.predicted(utilisation) / run.tokens_a_second)) for run in runs)
    most = errors[math.ceil(0.8 * len(errors)) - 1]
    spread = max(LEAST, math.sqrt(statistics.mean(e * e for e in errors)), 1.001 * most / Z80)
    return Calibration(utilisation, spread, "fitted to " + " and ".join(run.name for run in fitted))
