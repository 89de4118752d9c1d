"""The loop of every run (pre-training, SFT, RL): steps, telemetry and checkpoints, until the step or time limit."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from rorqual.data.loader import Batch, Loader
from rorqual.errors import UserError
from rorqual.plan.hardware import matrix_peak, memory_used
from rorqual.recipe import TrainSection
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.interrupts import StopSignals
from rorqual.train.schedule import batch_size
from rorqual.train.telemetry import Telemetry
from rorqual.train.trainer import Trainer

MAX_SKIPPED = 3  # non-finite steps in a row before the run stops


class Limits(Protocol):
    """How long a run lasts and what it saves: a recipe's train section, or an RL recipe."""

    steps: int | None
    seconds: float | None
    save_every: int
    keep: int


class Resumable(Protocol):
    """What a loop needs of its trainer."""

    steps: int
    skipped_in_a_row: int

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
    seconds_before: float = field(default=0.0, init=False)  # of earlier processes of this run

    def __post_init__(self) -> None:
        self.started = time.monotonic()

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
            return min(self.seconds / self._budget, 1.0)
        return min((self.trainer.steps + 0.5) / self.total_steps, 1.0)

    def done(self) -> bool:
        if self.total_steps is None:
            return self.seconds >= self._budget
        return self.trainer.steps >= self.total_steps

    def fit(self) -> None:
        """Run to the end, resuming from the newest checkpoint if there is one.

        Raises Stopped after SIGINT or SIGTERM, with a checkpoint saved; UserError when a checkpoint cannot be written,
        and what `step` raises.
        """
        self.started = time.monotonic()
        checkpoints = Checkpoints(self.run_dir, self.section.keep)
        self._resume(checkpoints)
        total, unit = (self._budget, "seconds") if self.total_steps is None else (self.total_steps, "steps")
        telemetry = Telemetry(self.run_dir, total, unit, self.track, self.trainer.steps)
        try:
            with StopSignals() as stop:
                self.begin(telemetry)
                ended = self.done()
                while not ended:
                    ended = self.step(telemetry)
                    due = self.trainer.steps % self.section.save_every == 0 and not self.trainer.skipped_in_a_row
                    if ended or stop.requested or due:
                        self._save(checkpoints)
                    if stop.requested:
                        raise stop.stopped(self.trainer.steps)
        finally:
            telemetry.close()

    def begin(self, telemetry: Telemetry) -> None:
        """Called once before the first step of every process."""

    @abstractmethod
    def step(self, telemetry: Telemetry) -> bool:
        """One step of the trainer, logged, with an evaluation where due. Returns whether it was the last."""

    @abstractmethod
    def score(self) -> float | None:
        """Of the newest step, lower is better; None where it was not evaluated."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the trainer's state and the seconds."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None: ...

    @property
    def _budget(self) -> float:
        assert self.section.seconds is not None  # a recipe gives steps, epochs or seconds
        return self.section.seconds

    def _save(self, checkpoints: Checkpoints) -> None:
        state = {"trainer": self.trainer.state(), "seconds": self.seconds} | self.state()
        good = not self.trainer.skipped_in_a_row
        checkpoints.save(self.trainer.steps, self.trainer.tensors(), state, self.score(), good)

    def _resume(self, checkpoints: Checkpoints) -> None:
        found = checkpoints.load_latest()
        if found is None:
            return
        step, tensors, state = found
        with checkpoints.reject_other_version(step):
            self.trainer.load(tensors, state["trainer"])
            self.seconds_before = 0.0 + state["seconds"]  # a TypeError for what is not a number
            self.load_state(state)


@dataclass
class Newest:
    """The newest results of a run, for its checkpoints and its model card."""

    loss: float | None = None  # nats per token, of the last step
    valid_bpb: float | None = None  # bits per byte on held-out text
    valid_bpb_step: int | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Newest":
        """What `asdict` returned and JSON kept; numbers that are not finite are text there. Other keys are ignored."""
        loss, bpb = (None if saved.get(name) is None else float(saved[name]) for name in ("loss", "valid_bpb"))
        return cls(loss, bpb, saved.get("valid_bpb_step"))


@dataclass
class TrainingRun(RunLoop[TrainSection, Trainer]):
    """Pre-training or SFT."""

    loader: Loader = field(kw_only=True)
    validate: Callable[[], float] | None = None  # bits per byte on held-out text
    newest: Newest = field(default_factory=Newest)

    @property
    def total_steps(self) -> int | None:
        if self.section.epochs is None:
            return self.section.steps
        first, until = self.section.batch_ramp or (self.section.batch_size, 0.0)
        average = self.section.batch_size + (first - self.section.batch_size) * min(until, 1.0) / 2
        return max(1, math.ceil(self.section.epochs * self.loader.rows / average))

    def step(self, telemetry: Telemetry) -> bool:
        """Raises UserError when three steps in a row are not finite."""
        start = time.monotonic()
        trainer, tokens, flops = self.trainer, self.trainer.tokens, self.trainer.flops
        progress = self.progress()
        batch = self.loader.next(batch_size(self.section, progress))
        metrics = trainer.step(split(batch, self.section.micro_batch), progress)
        elapsed, ended = time.monotonic() - start, self.done()
        tokens_per_second = (trainer.tokens - tokens) / elapsed
        utilisation = (trainer.flops - flops) / elapsed / matrix_peak(trainer.dtype)
        memory_gb = memory_used() / 1e9
        self.newest.loss = metrics.loss
        if not metrics.skipped and self.validate and (ended or trainer.steps % self.section.eval_every == 0):
            self.newest.valid_bpb, self.newest.valid_bpb_step = self.validate(), trainer.steps
        telemetry.log(
            trainer.steps, seconds=self.seconds, **metrics.to_dict(), tokens=trainer.tokens,
            tokens_per_second=tokens_per_second, utilisation=utilisation, memory_gb=memory_gb,
            valid_bpb=self.score(),
        )  # fmt: skip
        if metrics.skipped:
            self._skipped("loss" if metrics.grad_norm is None else "gradient", telemetry)
        return ended

    def _skipped(self, what: str, telemetry: Telemetry) -> None:
        steps, row = self.trainer.steps, self.trainer.skipped_in_a_row
        telemetry.note(f"step {steps}: the {what} is not finite; step skipped ({row} in a row)")
        if row >= MAX_SKIPPED:
            raise UserError(
                f"{self.run_dir}: {row} steps in a row had a {what} that is not finite, so training stopped at step "
                f"{steps} with the last good checkpoint kept; lower optimizer.lr or check the data"
            )

    def score(self) -> float | None:
        return self.newest.valid_bpb if self.newest.valid_bpb_step == self.trainer.steps else None

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "last": asdict(self.newest)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.newest = Newest.from_dict(state["last"])


def split(batch: Batch, size: int | None) -> list[Batch]:
    """Micro batches of at most `size` sequences; None: the whole batch at once."""
    count = len(batch.inputs)
    if size is None or size >= count:
        return [batch]
    return [_rows(batch, slice(i, i + size)) for i in range(0, count, size)]


def _rows(batch: Batch, rows: slice) -> Batch:
    documents = None if batch.documents is None else batch.documents[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], batch.weights[rows], batch.positions[rows], documents)
