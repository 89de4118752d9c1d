"""Pre-training and supervised fine-tuning."""

from rorqual.train.checkpoints import Checkpoints
from rorqual.train.interrupts import Stopped, StopSignals
from rorqual.train.optimizer import Optimizer, StepResult
from rorqual.train.rng import load_rng_tensors, rng_tensors, set_seed
from rorqual.train.schedule import schedule_factor
from rorqual.train.telemetry import Telemetry

__all__ = [
    "Checkpoints",
    "Optimizer",
    "StepResult",
    "StopSignals",
    "Stopped",
    "Telemetry",
    "load_rng_tensors",
    "rng_tensors",
    "schedule_factor",
    "set_seed",
]
