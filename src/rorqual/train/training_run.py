"""`rorqual pretrain` and `rorqual sft`: from a recipe to a trained model, and the run between.

Pre-training: text → tokenizer → packed tokens. SFT: conversations, with the loss on assistant turns only.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.data.datasets import open_chat_data, open_pretrain_data, open_tokenizer
from rorqual.data.loader import Batch, Heldout, Loader
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer
from rorqual.errors import Stopped, UserError, file_error
from rorqual.files import write_folder
from rorqual.kernels.devices import find_device
from rorqual.model import ModelConfig, Transformer
from rorqual.parallel.context import check_pieces, part
from rorqual.parallel.mesh import Mesh, joined, single
from rorqual.plan.estimate import predict
from rorqual.plan.hardware import matrix_peak, memory_used
from rorqual.recipe import (
    FineTuningRecipe,
    ParallelSection,
    PretrainRecipe,
    SFTRecipe,
    SpikesSection,
    TrainSection,
)
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.build_model import (
    Fill,
    build_model,
    build_part,
    check_length,
    set_threads,
    take_end_tokens,
    tokenizer_at,
)
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.ranks import RankWatch
from rorqual.train.release import finish
from rorqual.train.run_folder import first_alone, join_run
from rorqual.train.run_loop import RunLoop
from rorqual.train.schedule import batch_size
from rorqual.train.sharded_checkpoints import ShardedCheckpoints
from rorqual.train.spikes import Spikes
from rorqual.train.telemetry import Log, Metric
from rorqual.train.trainer import Trainer

EVAL_BATCHES = 32  # per validation; more changes bits per byte by less than training steps do
MAX_SKIPPED = 3  # non-finite steps in a row before the run stops


def pretrain(recipe: PretrainRecipe, resume: bool = False) -> Path:
    """Run the recipe and return the run's folder, with the released model in model/.

    Raises UserError for what the user can fix, Stopped after SIGINT or SIGTERM.
    """
    set_threads(recipe.train)
    check_length(recipe.model, recipe.data)
    check_pieces(recipe.data.sequence_length, recipe.parallel.context)
    device = find_device(recipe.device)
    with joined(recipe.parallel, device.type) as mesh, join_run(recipe, resume, mesh, device) as run_dir:
        with first_alone(mesh):
            tokenizer = _tokenizer(recipe, run_dir)
            loader, valid = open_pretrain_data(recipe.data, tokenizer, run_dir / "data", recipe.seed)
        model, fill = _built(recipe, tokenizer, mesh, recipe.data.sequence_length)
        run = train(recipe, run_dir, model, loader, valid, mesh, device, fill)
        return finish(recipe, run, tokenizer)


def sft(recipe: SFTRecipe, resume: bool = False, length_field: str = "data.sequence_length") -> Path:
    """Run the recipe and return the run's folder, with the released model in model/.

    length_field: what the user's recipe calls the length of its sequences. Raises UserError for what the user can fix,
    Stopped after SIGINT or SIGTERM.
    """
    set_threads(recipe.train)
    tokenizer = tokenizer_at(recipe.tokenizer_path)
    take_end_tokens(recipe.model, recipe.tokenizer_path, tokenizer)
    check_length(recipe.model, recipe.data)
    check_pieces(recipe.data.sequence_length, recipe.parallel.context)
    device = find_device(recipe.device)
    with joined(recipe.parallel, device.type) as mesh, join_run(recipe, resume, mesh, device) as run_dir:
        loader, valid, samples = open_chat_data(recipe.data, tokenizer, recipe.seed, length_field)
        cuts = samples.cuts(recipe.data.path, length_field, recipe.data.sequence_length)
        if mesh.rank == 0 and cuts:
            print(cuts, file=sys.stderr)
        model, fill = _built(recipe, tokenizer, mesh, recipe.data.sequence_length)
        run = train(recipe, run_dir, model, loader, valid, mesh, device, fill)
        return finish(recipe, run, tokenizer)


def _built(
    recipe: PretrainRecipe | SFTRecipe, tokenizer: Tokenizer, mesh: Mesh, length: int
) -> tuple[Transformer, Fill | None]:
    """The model; of several processes, its outline, and what fills each one's part."""
    if mesh.section.processes == 1:
        lora = recipe.lora if isinstance(recipe, FineTuningRecipe) else None
        return build_model(recipe.model, tokenizer, recipe.seed, length, lora), None
    return build_part(recipe.model, tokenizer, recipe.seed, length)


def _tokenizer(recipe: PretrainRecipe, run_dir: Path) -> Tokenizer:
    """The recipe's tokenizer, the model's, or one trained now and saved in the run's folder."""
    for path in (recipe.tokenizer.path, recipe.model.path):
        if path is not None:
            return load_tokenizer(path)
    kept = run_dir / "tokenizer"
    if not kept.exists():
        tokenizer = open_tokenizer(recipe.tokenizer, recipe.data)
        try:
            with write_folder(kept) as folder:
                save_tokenizer(tokenizer, folder)
        except OSError as e:
            raise file_error(kept, e, then="or set out to a writable place") from e
    return load_tokenizer(kept)


def train(
    recipe: PretrainRecipe | SFTRecipe, run_dir: Path, model: Transformer, loader: Loader, valid: Heldout | None,
    mesh: Mesh | None = None, device: torch.device | None = None, fill: Fill | None = None,
) -> "TrainingRun":  # fmt: skip
    """Train the recipe to its end, resuming from the newest checkpoint. Raises as `TrainingRun.fit`.

    device: None: where the model is. fill: see Trainer.
    """
    section, mesh = recipe.train, mesh or single()
    run = TrainingRun(
        run_dir=run_dir,
        section=section,
        trainer=Trainer(
            model,
            recipe.optimizer,
            recipe.schedule,
            recipe.mtp,
            recipe.balance,
            dtype=recipe.model.dtype,
            ema=section.ema,
            compile=section.compile,
            precision=recipe.precision,
            recompute=recipe.recompute,
            mesh=mesh,
            micro_batches=micro_batches(section, mesh.section),
            device=device,
            fill=fill,
            notify=print if mesh.rank == 0 else lambda _: None,
        ),
        loader=loader,
        spikes=Spikes(recipe.spikes),
        track=recipe.track,
        mesh=mesh,
        forecast=lambda: _forecast(model.config, recipe, loader.rows, mesh.section.processes, run.trainer.device),
    )
    if valid is not None:
        size = section.micro_batch or section.batch_size
        run.validate = lambda: run.trainer.bits_per_byte(valid.batches(size, EVAL_BATCHES))
    try:
        run.fit()
    except Stopped:  # by all processes
        run.trainer.close()
        raise
    return run


def _forecast(
    config: ModelConfig, recipe: PretrainRecipe | SFTRecipe, rows: int, processes: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """What the run will cost; times are known for one process on a CPU alone."""
    plan: dict[str, Any] = {**predict(config, recipe, rows, device)}
    if processes > 1 or torch.device(device).type != "cpu":
        for name in ("tokens_per_second", "tokens_per_second_interval", "seconds", "utilisation", "calibration"):
            del plan[name]
    return plan


def micro_batches(section: TrainSection, parallel: ParallelSection) -> int:
    """Of each process in a step. Raises UserError where they cannot all be alike, as pipeline stages need them."""
    rows = -(-section.batch_size // parallel.data)
    size = section.micro_batch or rows
    if parallel.pipeline > 1:
        if section.batch_ramp:
            raise UserError(
                "train.batch_ramp with parallel.pipeline: every step needs as many micro-batches; remove one"
            )
        if section.batch_size % parallel.data or rows % max(size, 1):
            raise UserError(
                f"train.batch_size = {section.batch_size}: a pipeline needs equal micro-batches of train.micro_batch = "
                f"{size} sequences on each of parallel.data = {parallel.data} ranks; make it a multiple of "
                f"{max(size, 1) * parallel.data}"
            )
    return -(-rows // size)


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
    spikes: Spikes = field(default_factory=lambda: Spikes(SpikesSection()))
    validate: Callable[[], float] | None = None  # bits per byte on held-out text
    newest: Newest = field(default_factory=Newest)
    watch: RankWatch = field(default_factory=RankWatch)
    forecast: Callable[[], Mapping[str, Any]] = field(default=dict)
    steps_here: int = 0  # of this process
    tokens_a_step: int = 0  # of all processes, in the newest step

    @property
    def total_steps(self) -> int | None:
        if self.section.epochs is None:
            return self.section.steps
        first, until = self.section.batch_ramp or (self.section.batch_size, 0.0)
        average = self.section.batch_size + (first - self.section.batch_size) * min(until, 1.0) / 2
        return max(1, math.ceil(self.section.epochs * self.loader.rows / average))

    def step(self, telemetry: Log) -> bool:
        """Raises UserError when three steps in a row are not finite, and at a spike that is to stop the run."""
        start = time.monotonic()
        trainer, tokens, flops = self.trainer, self.trainer.tokens, self.trainer.flops
        progress = self.progress()
        data = self.mesh.data
        rows = -(-batch_size(self.section, progress) // data.size)  # of each process
        batch = _rows(self.loader.next(rows * data.size), slice(rows * data.place, rows * (data.place + 1)))
        micro_batches = [part(b, self.mesh.context) for b in split(batch, self.section.micro_batch)]
        metrics = trainer.step(micro_batches, progress)
        self.steps_here, self.tokens_a_step = self.steps_here + 1, trainer.tokens - tokens
        elapsed, ended = time.monotonic() - start, self.done()
        tokens_per_second = (trainer.tokens - tokens) / elapsed
        peak = matrix_peak(trainer.dtype, trainer.device.type) * self.mesh.section.processes
        utilisation = (trainer.flops - flops) / elapsed / peak
        memory_gb = memory_used(trainer.device.type) / 1e9
        self.newest.loss = metrics.loss
        if not metrics.skipped and (ended or trainer.steps % self.section.eval_every == 0):
            self.evaluate()
        telemetry.log(
            trainer.steps, seconds=self.seconds, **metrics.to_dict(), tokens=trainer.tokens,
            tokens_per_second=tokens_per_second, utilisation=utilisation, memory_gb=memory_gb,
            **self.evaluated(),
        )  # fmt: skip
        for sentence in self.watch.new(metrics.ranks):
            telemetry.note(f"step {trainer.steps}: {sentence}")
        if metrics.skipped:
            what = "loss" if metrics.grad_norm is None else "gradient"
            went_back = self._skipped(what, metrics.ranks_not_finite, telemetry)
        else:
            spike = self.spikes.find(metrics.loss, metrics.grad_norm or 0.0)
            went_back = spike is not None and self._spiked(spike, telemetry)
        return ended and not went_back

    def evaluate(self) -> None:
        """On held-out data, where there is some."""
        if self.validate:
            self.newest.valid_bpb, self.newest.valid_bpb_step = self.validate(), self.trainer.steps

    def evaluated(self) -> dict[str, Metric]:
        """What was found at the newest step, for metrics.jsonl."""
        return {"valid_bpb": self.score()}

    def _spiked(self, what: str, telemetry: Log) -> bool:
        """Go on, stop or roll back, as the recipe says; returns whether it rolled back."""
        spikes, step = self.spikes, self.trainer.steps
        if spikes.section.action == "continue":
            if spikes.in_a_row == 1:
                telemetry.note(f"step {step}: {what}; training goes on")
            return False
        self.saved.finish()
        spikes.check(f"{self.run_dir}: step {step}: {what}", self.saved.steps())
        position, times = self.loader.state_dict(), spikes.roll_backs + 1
        self.roll_back(telemetry)
        self.loader.load_state_dict(position)
        spikes.roll_backs = times
        telemetry.note(
            f"step {step}: {what}; rolled back to step {self.trainer.steps}, without the data since then ({times} of "
            f"at most {spikes.section.limit} times)"
        )
        return True

    def _skipped(self, what: str, ranks: tuple[int, ...], telemetry: Log) -> bool:
        """Returns whether it rolled back."""
        steps, row = self.trainer.steps, self.trainer.skipped_in_a_row
        if ranks and self.mesh.section.processes > 1:
            what += f" of rank {', '.join(map(str, ranks))}"
        telemetry.note(f"step {steps}: the {what} is not finite; step skipped ({row} in a row)")
        if row >= MAX_SKIPPED and self.rolls_back:
            return self._spiked(f"the {what} was not finite {row} times in a row", telemetry)
        if row >= MAX_SKIPPED:
            raise UserError(
                f"{self.run_dir}: {row} steps in a row had a {what} that is not finite, so training stopped at step "
                f"{steps} with the last good checkpoint kept; lower optimizer.lr or check the data"
            )
        return False

    def predict(self) -> Mapping[str, Any]:
        return self.forecast()

    def score(self) -> float | None:
        return self.newest.valid_bpb if self.newest.valid_bpb_step == self.trainer.steps else None

    @property
    def rolls_back(self) -> bool:
        return self.spikes.section.action == "roll-back"

    def checkpoints(self) -> Checkpoints:
        if self.mesh.section.processes == 1:
            return super().checkpoints()
        return ShardedCheckpoints(self.run_dir, self.section.keep, self.mesh, self.trainer.slices)

    def tensors(self) -> dict[str, Tensor]:
        return self.trainer.own_tensors()

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "last": asdict(self.newest), "spikes": self.spikes.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.newest = Newest.from_dict(state["last"])
        if "spikes" in state:  # earlier versions wrote none
            self.spikes.load(state["spikes"])


def split(batch: Batch, size: int | None) -> list[Batch]:
    """Micro batches of at most `size` sequences; None: the whole batch at once."""
    count = len(batch.inputs)
    if size is None or size >= count:
        return [batch]
    return [_rows(batch, slice(i, i + size)) for i in range(0, count, size)]


def _rows(batch: Batch, rows: slice) -> Batch:
    documents = None if batch.documents is None else batch.documents[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], batch.weights[rows], batch.positions[rows], documents)
