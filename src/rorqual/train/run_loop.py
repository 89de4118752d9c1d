"""The loop of every run (pre-training, SFT, RL): steps, telemetry and checkpoints, until the step or time limit."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.parallel.mesh import Mesh, single
from rorqual.plan.energy import EnergyMeter
from rorqual.plan.ledger import predicted_at_start
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.interrupts import StopSignals
from rorqual.train.telemetry import Log, Silent, Telemetry


class Limits(Protocol):
    """How long a run lasts and what it saves: a recipe's train section, or an RL recipe."""

    steps: int | None
    seconds: float | None
    save_every: int
    keep: int


class Resumable(Protocol):
    """What a loop needs of its trainer."""

    steps: int

    @property
    def skipped_in_a_row(self) -> int: ...
    def state(self) -> Any: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, tensors: dict[str, Tensor], state: Any) -> None: ...


LimitsT = TypeVar("LimitsT", bound=Limits)
TrainerT = TypeVar("TrainerT", bound=Resumable)


@dataclass
class RunLoop(ABC, Generic[LimitsT, TrainerT]):
    """One run: `fit` resumes from the newest checkpoint, if any, and goes on to the end."""

    run_dir: Path
    section: LimitsT
    trainer: TrainerT
    track: bool = False
    mesh: Mesh = field(default_factory=single, kw_only=True)
    seconds_before: float = field(default=0.0, init=False)  # of earlier processes of this run
    joules_before: float = field(default=0.0, init=False)
    saved: Checkpoints = field(init=False)  # from `fit` on
    predicted: Mapping[str, Any] = field(default_factory=dict, init=False)  # what the run would cost, before it began

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.meter = EnergyMeter()

    @property
    def joules(self) -> float | None:
        """Of this machine's processors, over all resumptions; None where it does not tell."""
        found = self.meter.joules()
        return None if found is None else self.joules_before + found

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, over all resumptions, without the time lost in a crash."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None for a run with a time budget."""
        return self.section.steps

    def progress(self) -> float:
        """Fraction of the run that is done, at the middle of the next step."""
        if self.total_steps is None:
            return min(self._firsts(self.seconds) / self._budget, 1.0)
        return min((self.trainer.steps + 0.5) / self.total_steps, 1.0)

    def done(self) -> bool:
        if self.total_steps is None:
            return self._firsts(self.seconds) >= self._budget
        return self.trainer.steps >= self.total_steps

    def fit(self) -> None:
        """Run to the end, resuming from the newest checkpoint if there is one.

        Raises Stopped after SIGINT or SIGTERM, with a checkpoint saved; UserError when a checkpoint cannot be written,
        and what `step` raises.
        """
        self.started = time.monotonic()
        self.saved = checkpoints = self.checkpoints()
        self._resume(checkpoints)
        if self.mesh.rank == 0:
            self.predicted = predicted_at_start(self.run_dir, self.predict, begins=not self.trainer.steps)
        if self.rolls_back and not self.trainer.steps:
            self._save(checkpoints)
        total, unit = (self._budget, "seconds") if self.total_steps is None else (self.total_steps, "steps")
        telemetry = Silent() if self.mesh.rank else Telemetry(self.run_dir, total, unit, self.track, self.trainer.steps)
        try:
            with StopSignals() as stop:
                self.begin(telemetry)
                ended = self.done()
                while not ended:
                    ended = self.step(telemetry)
                    checkpoints.poll()
                    stopped = self._stopped(stop)
                    due = self.trainer.steps % self.section.save_every == 0 and not self.trainer.skipped_in_a_row
                    if ended or stopped or due:
                        self._save(checkpoints)
                    if stopped:
                        checkpoints.finish()
                        raise stop.stopped(self.trainer.steps)
                checkpoints.finish()
        finally:
            telemetry.close()

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run_dir, self.section.keep)

    @property
    def rolls_back(self) -> bool:
        """Whether `roll_back` may be called."""
        return False

    def roll_back(self, telemetry: Log) -> None:
        """Restore all but the time from the newest good checkpoint. Raises UserError where there is none."""
        self.saved.finish()
        found = self.saved.load_latest(good=True)
        if found is None:
            raise UserError(f"{self.saved.directory} has no checkpoint to roll back to; start again under another name")
        self._restore(self.saved, *found)
        self.saved.discard_after(self.trainer.steps)
        telemetry.back_to(self.trainer.steps)

    def predict(self) -> Mapping[str, Any]:
        """What the run will cost, for its ledger."""
        return {}

    def begin(self, telemetry: Log) -> None:
        """Called once before the first step of every process."""

    @abstractmethod
    def step(self, telemetry: Log) -> bool:
        """One step of the trainer, logged, with an evaluation where due. Returns whether it was the last."""

    @abstractmethod
    def score(self) -> float | None:
        """Of the newest step, lower is better; None where it was not evaluated."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the trainer's state and the seconds."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """What this process writes to a checkpoint."""
        return self.trainer.tensors()

    @property
    def _budget(self) -> float:
        assert self.section.seconds is not None  # a recipe gives steps, epochs or seconds
        return self.section.seconds

    def _firsts(self, value: float) -> float:
        """The first process's value: clocks differ."""
        return float(self.mesh.world.gather(torch.tensor([value], dtype=torch.float64), "time")[0])

    def _stopped(self, stop: StopSignals) -> bool:
        """Whether one of the processes got a signal; the others take it for theirs."""
        numbers = self.mesh.world.gather(torch.tensor([stop.number]), "stop signals")
        stop.number = max(map(int, numbers))
        return stop.number > 0

    def _save(self, checkpoints: Checkpoints) -> None:
        state = {"trainer": self.trainer.state(), "seconds": self.seconds, "joules": self.joules} | self.state()
        # A roll-back must not depend on when the run was stopped.
        due = self.trainer.steps % self.section.save_every == 0 or not self.rolls_back
        good = due and not self.trainer.skipped_in_a_row
        checkpoints.save(self.trainer.steps, self.tensors(), state, self.score(), good)

    def _resume(self, checkpoints: Checkpoints) -> None:
        found = checkpoints.load_latest()
        if found is None:
            return
        self._restore(checkpoints, *found)
        with checkpoints.reject_other_version(found[0]):
            self.seconds_before = 0.0 + found[2]["seconds"]  # a TypeError for what is not a number
            self.joules_before = 0.0 + (found[2].get("joules") or 0)

    def _restore(
        self, checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        with checkpoints.reject_other_version(step):
            self.trainer.load(tensors, state["trainer"])
            self.load_state(state)
