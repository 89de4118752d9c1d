"""One optimizer step of next-token training. Pre-training, SFT and the speedrun drive it.

With a mesh of several processes each takes the step with the sequences that are its own; sums over tokens (losses,
weights, expert loads, gradients) are over all of them.

Shapes: B sequences in a micro-batch, T tokens, D hidden size, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rorqual.adapters.lora import lora_parameters
from rorqual.data.loader import Batch
from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import Transformer
from rorqual.model.moe import MixtureOfExperts, Routing
from rorqual.parallel.context import part, share_sequences
from rorqual.parallel.courier import Courier
from rorqual.parallel.data import Slice
from rorqual.parallel.deep_ep import check_deep_ep
from rorqual.parallel.experts import close_experts, first_expert, spread_experts
from rorqual.parallel.group import Group
from rorqual.parallel.mesh import Mesh, single
from rorqual.parallel.pipeline import Pipeline
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.precision.convert import convert
from rorqual.precision.recompute import Activations, Recompute
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.train.balance import max_violations, update_correction_bias
from rorqual.train.build_model import Fill
from rorqual.train.compile import compiled
from rorqual.train.ema import EMA
from rorqual.train.objective import Objective
from rorqual.train.optimizer import Optimizer
from rorqual.train.ranks import RankReport, gather_reports, not_finite
from rorqual.train.rng import load_rng_tensors, rng_tensors
from rorqual.train.schedule import bias_speed, mtp_weight, schedule_factor
from rorqual.train.telemetry import Metric, mean


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured; None: not computed."""

    loss: float  # nats per token
    lr: float
    mtp_loss: float | None  # mean over the MTP depths
    grad_norm: float | None  # before clipping; None where the loss is not finite
    max_vio_per_layer: list[float] | None  # MaxVio of each MoE layer
    skipped: bool  # the loss or the gradient was not finite
    ranks_not_finite: tuple[int, ...] = ()  # whose loss was not, or where all were, whose gradient
    ranks: tuple[RankReport, ...] = ()  # of all

    def to_dict(self) -> dict[str, Metric]:
        """The metrics of a line of metrics.jsonl."""
        return {
            "loss": self.loss,
            "lr": self.lr,
            "mtp_loss": self.mtp_loss,
            "grad_norm": self.grad_norm,
            "max_vio": mean(self.max_vio_per_layer),
            "max_vio_per_layer": self.max_vio_per_layer,
        }


class Trainer:
    """Model, optimizer, EMA and counters of a training run."""

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerSection,
        schedule: ScheduleSection,
        mtp: MTPSection | None = None,
        balance: BalanceSection | None = None,
        *,
        dtype: str = "auto",
        ema: float | None = None,
        compile: bool = False,
        precision: str | None = None,
        recompute: Recompute = "none",
        offload: bool = False,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
        device: torch.device | None = None,
        fill: Fill | None = None,
        notify: Callable[[str], None] = print,
        objective: type[Objective] = Objective,
    ) -> None:
        """Convert `model` to `dtype` ("auto": the fastest on its device) in place, on `device` (None: where it is).

        Without `mtp` or `balance` the MTP loss or the load balancing is off. `precision` (a key of PRECISIONS) is that
        of products; `recompute` and `offload`: see precision/recompute.py. `mesh`: the processes that train together;
        with pipeline stages, every step has as many `micro_batches`. `fill`: of a model on the meta device, what gives
        the part that stays here its weights. `objective`: what is minimised.
        """
        if precision is not None:
            for line in convert(model, precision).lines():
                notify(line)
        self.mesh, self.objective = mesh or single(), objective
        self.device = device or next(model.parameters()).device
        self.dtype = compute_dtype(dtype, self.device)
        check_deep_ep(self.mesh.section, self.dtype, self.device)
        self.courier = Courier(self.mesh.section.overlap)
        spread_experts(model, self.mesh, self.courier)
        share_sequences(model, self.mesh.context)
        self.activations, self.recompute = Activations(model, recompute, offload), recompute
        self.moe_indices = [i for i, layer in enumerate(model.model.layers) if is_mixture(layer)]
        self.pipeline: Pipeline | None = None
        if self.mesh.pipeline.size > 1:
            order = self.mesh.section.schedule
            self.pipeline = Pipeline(model, self.mesh, self.courier, order, micro_batches, self.activations.kept)
        if fill is not None:
            fill(model, first_expert(model, self.mesh), self.device)
        model.to(self.device)  # of what this process holds
        self.model, self.schedule = model, schedule
        self.mtp = mtp or MTPSection(weight=0.0, final_weight=0.0)
        self.balance = balance or BalanceSection(bias_speed=0.0, sequence_loss=0.0)
        self.frozen = bool(lora_parameters(model))  # the base is, with LoRA
        self.optimizer = Optimizer(model, optimizer, self.dtype, self.mesh)
        self.optimizer.copies = self.pipeline.copies if self.pipeline else frozenset[str]()
        # Micro-batches cannot take turns with a layer that is gathered for one of them.
        self.takes_turns = self.mesh.experts.size > 1 and self.courier.background and self.optimizer.layers is None
        self.ema = EMA(self.optimizer, ema) if ema else None
        self.forward = compiled(model, notify) if compile else model
        self.depth = model.config.num_nextn_predict_layers
        self.steps = self.tokens = self.skipped_in_a_row = 0
        self.micro_batches = micro_batches  # of the newest step
        self.flops = 0.0

    def step(self, micro_batches: Sequence[Batch], progress: float) -> StepMetrics:
        """One optimizer step over all micro-batches, with several processes those of this one, or its `part` of each;
        `progress` in [0, 1].

        The loss is the weighted mean over tokens of cross-entropy + λ/depth · Σ MTP losses (V3 eq. 25)
        + α · sequence-wise balance loss. A step with a non-finite loss or gradient is skipped and changes only the
        counters.
        """
        λ = mtp_weight(self.mtp, progress) if self.depth else 0.0
        self.mesh.traffic.step = self.steps + 1
        self.micro_batches = len(micro_batches)
        totals, sequences = self._totals(micro_batches, ahead=λ > 0)
        objective = self.objective(self.model, totals, λ, self.balance.sequence_loss, sequences)
        self.model.train()
        batches = [batch.to(self.device) for batch in micro_batches]
        if self.pipeline is None:
            loads = self._accumulate(batches, objective)
        else:
            self.pipeline.run(batches, objective, self.optimizer.accumulate)
            self.pipeline.sum_copies(self.optimizer.grads)
            loads = self.pipeline.loads
        ranks, losses = gather_reports(self.mesh, micro_batches, objective, self.optimizer)
        loads = list(self.mesh.tokens.sum(torch.stack(loads), "expert loads")) if loads else []
        factor = schedule_factor(self.schedule, progress)
        result = self.optimizer.step(factor) if all(own.finite for own in ranks) else None
        if result is None:
            self.optimizer.discard()
        skipped = result is None or result.skipped
        self._count(micro_batches, λ > 0, skipped)
        if not skipped:
            self._after(loads, progress)
        return StepMetrics(
            loss=float(losses[0]),
            lr=self.optimizer.section.lr * factor,
            mtp_loss=float(losses[1:].mean()) if λ else None,
            grad_norm=None if result is None else result.grad_norm,
            max_vio_per_layer=self._violations(loads),
            skipped=skipped,
            ranks_not_finite=not_finite(ranks),
            ranks=tuple(ranks),
        )

    def close(self) -> None:
        """End threads, and free what DeepEP holds; all processes call it together, before they part."""
        self.courier.close()
        close_experts(self.model)

    @torch.no_grad()
    def bits_per_byte(self, batches: Iterable[tuple[Batch, int]]) -> float:
        """Bits per byte of the released weights on held-out text, given (batch, bytes of text in its targets).

        Several processes are given the same batches and take turns with them; what they send is not counted.
        """
        self.model.eval()
        sent = self.mesh.traffic.sent.copy()
        nats, length = 0.0, 0
        with self.released_weights():
            for whole, size in _turns(batches, self.mesh.data):
                batch = part(whole, self.mesh.context).to(self.device)
                hidden = self._hidden(batch)
                if hidden is None:
                    continue
                flat = batch.weights.flatten()
                loss = linear_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, batch.targets.flatten(), flat)
                nats += float(loss) * (size > 0)
                length += size * (self.mesh.context.place == 0)
        total = self.mesh.world.sum(torch.tensor([nats, length], dtype=torch.float64), "bits per byte")
        self.mesh.traffic.sent = sent
        return float(total[0]) / (0.6931471805599453 * max(float(total[1]), 1))

    def _hidden(self, batch: Batch) -> Tensor | None:
        """Hidden states after the last norm; None where another stage has them."""
        if self.pipeline is None:
            return self.model(batch.inputs, batch.positions, batch.attention_mask)
        found = self.pipeline.evaluate([batch])
        return found[0] if found else None

    @contextmanager
    def released_weights(self) -> Iterator[None]:
        """Context in which the model holds the weights to release: the EMA where there is one."""
        with self.ema.applied() if self.ema else nullcontext():
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: model, optimizer, EMA and generator states."""
        return self.optimizer.tensors() | (self.ema.tensors() if self.ema else {}) | rng_tensors()

    def own_tensors(self) -> dict[str, Tensor]:
        """Those of `tensors()` that this process writes: of what several have alike, the first does."""
        alike = {"buffers.": self.mesh.tokens.place, "rng.": self.mesh.rank}
        return {
            name: t
            for name, t in self.tensors().items()
            if not any(name.startswith(kind) and place for kind, place in alike.items())
            and not any(name.endswith(copy) for copy in self.optimizer.copies)
        }

    def slices(self) -> dict[str, Slice]:
        """The rows of the whole model's tensors that `tensors()` has, of those that are cut."""
        own = self.optimizer.slices()
        return own | {name.replace("weights.", "ema.", 1): s for name, s in own.items() if name.startswith("weights.")}

    def state(self) -> dict[str, float]:
        """The counters of a checkpoint."""
        names = ("steps", "tokens", "skipped_in_a_row", "flops")
        return {name: getattr(self, name) for name in names}

    def load(self, tensors: dict[str, Tensor], state: dict[str, float]) -> None:
        """Restore what `tensors()` and `state()` returned. Raises UserError when they are another model's."""
        sent = self.mesh.traffic.sent.copy()
        self.optimizer.load_tensors(tensors)
        self.mesh.traffic.sent = sent  # of steps alone
        if self.ema:
            self.ema.load_tensors(tensors)
        load_rng_tensors(tensors)
        for name in self.state():
            setattr(self, name, state[name])

    def _accumulate(self, micro_batches: Sequence[Batch], objective: Objective) -> list[Tensor]:
        """Forward and backward pass of each micro-batch → the load of each mixture layer's experts.

        Where tokens travel to experts, a backward pass and the next micro-batch's forward pass take turns (V3 §3.2.1).
        """
        loads: list[Tensor] = []
        due: Tensor | None = None  # the loss whose backward pass has yet to run
        for batch in micro_batches:
            forward = partial(self._forward, batch, objective)
            if due is None:
                loss, found = forward()
            else:
                _, (loss, found) = self.courier.together(partial(self._backward, due), forward)
            if not objective.finite and self.mesh.section.processes == 1:
                break  # with several, the others need this one for their own tokens
            loads = [a + b for a, b in zip(loads, found, strict=True)] if loads else found
            if self.takes_turns:
                due = loss
            else:
                self._backward(loss)
        if due is not None:
            self._backward(due)
        return loads

    def _forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, list[Tensor]]:
        """The loss [] and the load of each mixture layer's experts."""
        routing: list[Routing] = []
        with self.activations.kept():
            hidden = self.forward(batch.inputs, batch.positions, batch.attention_mask, routing=routing)
            loss = objective.losses(hidden, batch, routing)
            balance = objective.auxiliary(routing, batch)
        return loss if balance is None else loss + balance, [r.load.detach() for r in routing]

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.accumulate()

    def _totals(self, micro_batches: Sequence[Batch], ahead: bool) -> tuple[list[float], float]:
        """The sum of all tokens' weights for each loss, and the number of sequences, of all processes."""
        depths = range(1 + (self.depth if ahead else 0))
        sums = [sum(float(b.ahead(k)[1].double().sum()) for b in micro_batches) for k in depths]
        own = torch.tensor([*sums, sum(len(b.inputs) for b in micro_batches)], dtype=torch.float64)
        *totals, sequences = self.mesh.tokens.sum(own, "weights of tokens").tolist()
        return [max(total, 1e-9) for total in totals], sequences

    def _violations(self, loads: list[Tensor]) -> list[float] | None:
        """MaxVio of each mixture layer, of all stages; None where there is none."""
        own = max_violations(loads)
        if self.pipeline is None:
            return own or None
        held = [i for i, layer in enumerate(self.model.model.layers) if is_mixture(layer)]
        everywhere = torch.zeros(len(self.moe_indices), dtype=torch.float64)
        for index, value in zip(held, own, strict=False):  # multi-token modules come last, and may not have run
            everywhere[self.moe_indices.index(index)] = value
        return self.mesh.pipeline.sum(everywhere, "expert loads").tolist() or None

    def _after(self, loads: list[Tensor], progress: float) -> None:
        speed = bias_speed(self.balance, progress)
        if speed and loads:
            update_correction_bias(self.model, loads, speed)
        if self.ema:
            self.ema.update()

    def _count(self, micro_batches: Sequence[Batch], ahead: bool, skipped: bool) -> None:
        config = self.model.flops_config
        for batch in micro_batches:
            length = batch.inputs.shape[1] * self.mesh.context.size
            each = flops_per_token(config, length, frozen=self.frozen)
            each += mtp_flops_per_token(config, length, self.frozen) if ahead else 0.0
            tokens = len(batch.inputs) * length * self.mesh.data.size  # each has as many
            self.tokens += tokens
            self.flops += each * tokens
        self.steps += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def _turns(batches: Iterable[tuple[Batch, int]], group: Group) -> Iterator[tuple[Batch, int]]:
    """Every size-th batch. All ranks get as many, since experts need all of them: where batches run out, one of the
    last round again with a size of 0, which does not count.
    """
    held: list[tuple[Batch, int]] = []
    for found in batches:
        held.append(found)
        if len(held) == group.size:
            yield held[group.place]
            held.clear()
    if held:
        yield held[group.place] if group.place < len(held) else (held[0][0], 0)


def is_mixture(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "mlp", None), MixtureOfExperts)
