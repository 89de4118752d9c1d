"""Pipeline parallelism: each rank runs its steps of a schedule, on the layers of its stages.

Embedding, and its multi-token look-ups, are in stage 0; norm, head and multi-token modules in the last stage, which
DualPipeV has on the same rank (V3 §3.2.3). Gradients are the same bits as in one process that accumulates over the
same micro-batches, except those of a tied embedding, which are added in another order.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.errors import UserError
from rorqual.kernels.deferred_gradients import WeightGradients, deferrable, deferred_weight_gradients
from rorqual.model import Transformer
from rorqual.model.moe import Routing
from rorqual.model.parameter_kinds import is_converted
from rorqual.parallel.courier import Courier
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.parcels import EMBEDDINGS, Flow, Parcel, Post
from rorqual.parallel.stages import keep, looked_up
from rorqual.plan.schedule import SCHEDULES, Action, Schedule
from rorqual.plan.simulate import Timeline
from rorqual.plan.stage_layers import layers_of_stages
from rorqual.shapes import Float

EMBEDDING = "model.embed_tokens.weight"

Compute = Callable[[Action, list[Tensor]], list[Tensor]]


class Objective(Protocol):
    """What is minimised: the sum of all that it returns."""

    def losses(self, hidden: Float[Tensor, "B T D"], batch: Batch, routing: list[Routing]) -> Tensor:
        """A scalar, from the hidden states after the last norm. May call the model's `mtp_hidden_states` once, with
        `routing`, which holds the last stage's."""
        ...

    def auxiliary(self, routing: list[Routing], batch: Batch) -> Tensor | None:
        """A scalar, from the routing of one stage's mixture-of-experts layers, in their order."""
        ...


@dataclass
class _Graph:
    """A stage of a micro-batch, between its forward and its backward pass."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    losses: list[Tensor]


@dataclass
class _Work:
    """The computing of one run. Without an objective there is no backward pass, and `hidden` collects results."""

    model: Transformer
    flow: Flow
    layers: tuple[range, ...]
    batches: Sequence[Batch]
    objective: Objective | None
    kept: Callable[[], AbstractContextManager[None]]
    hidden: list[Tensor] = field(default_factory=list[Tensor])
    loads: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])  # by stage
    graphs: dict[tuple[int, int], _Graph] = field(default_factory=dict[tuple[int, int], _Graph])
    due: dict[tuple[int, int], WeightGradients] = field(default_factory=dict[tuple[int, int], WeightGradients])

    def __call__(self, action: Action, given: list[Tensor]) -> list[Tensor]:
        """The tensors of the parcels needed → of those made."""
        key = action.stage, action.micro_batch
        match action.kind:
            case "F":
                return self._forward(*key, given)
            case "B":
                return _backward(self.graphs.pop(key), given)
            case "I":
                with deferred_weight_gradients() as self.due[key]:
                    return _backward(self.graphs.pop(key), given)
            case "W":
                self.due.pop(key).run()
                return []

    def _forward(self, stage: int, micro_batch: int, given: list[Tensor]) -> list[Tensor]:
        batch, model, routing = self.batches[micro_batch], self.model, list[Routing]()
        graph = _Graph([t.requires_grad_(self.objective is not None) for t in given], [], [])
        with self.kept():
            x, *ahead = graph.inputs if stage else self._embedded(batch)
            layers = [model.model.layers[i] for i in self.layers[stage]]
            x = model.run_layers(x, layers, batch.positions, batch.attention_mask, routing=routing)
            if stage < len(self.layers) - 1:
                graph.outputs = [x] if stage else [x, *ahead]
            elif self.objective is None:
                self.hidden.append(model.model.norm(x))
            else:
                rows = looked_up(model.model.embed_tokens, ahead[0].unbind()) if ahead else nullcontext()
                with rows:
                    graph.losses.append(self.objective.losses(model.model.norm(x), batch, routing))
            if self.objective is not None:
                auxiliary = self.objective.auxiliary(routing, batch)
                if auxiliary is not None and auxiliary.requires_grad:
                    graph.losses.append(auxiliary)
                self.graphs[stage, micro_batch] = graph
        loads, before = [r.load.detach() for r in routing], self.loads.get(stage)
        self.loads[stage] = loads if before is None else [a + b for a, b in zip(before, loads, strict=True)]
        return [t.detach() for t in graph.outputs]

    def _embedded(self, batch: Batch) -> list[Tensor]:
        """The first layer's input; and, where the last stage needs them, that of each multi-token module."""
        embedding = self.model.model.embed_tokens
        found = [embedding(batch.inputs)]
        if self.flow.embeddings:
            depths = range(1, 1 + self.model.config.num_nextn_predict_layers)
            found.append(torch.stack([embedding(batch.following(depth)) for depth in depths]))
        return found


def _backward(graph: _Graph, given: list[Tensor]) -> list[Tensor]:
    """The gradients of outputs → of inputs."""
    torch.autograd.backward([*graph.outputs, *graph.losses], [*given, *[None] * len(graph.losses)])
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in graph.inputs]


class Pipeline:
    """This rank's part of a model, and its part of a schedule."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        courier: Courier,
        schedule: str,
        micro_batches: int,
        kept: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Leaves to `model` what this rank holds, in place. kept: context of forward passes (precision/recompute.py).

        Raises UserError for an unknown schedule, too few micro-batches, and fewer layers than stages.
        """
        if schedule not in SCHEDULES:
            raise UserError(f"parallel.schedule {schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}")
        self.model, self.group, self.courier, self.kept = model, mesh.pipeline, courier, kept
        self.schedule = SCHEDULES[schedule](self.group.size, micro_batches)
        self.layers = layers_of_stages(model.config, self.schedule)
        stages, ranks = self.schedule.stages, self.schedule.rank_of_stage
        self.held = [stage for stage in range(stages) if ranks[stage] == self.group.place]
        first, last = (stage in self.held for stage in (0, stages - 1))
        keep(model, (layer for stage in self.held for layer in self.layers[stage]), first, last)
        self.tied = model.config.tie_word_embeddings and ranks[0] != ranks[-1]
        # Parameters that are the same on another rank, which counts and saves them.
        self.copies = frozenset({EMBEDDING} if self.tied and last else ())
        self.flow = Flow(self.schedule, self.group.place, model.config.num_nextn_predict_layers > 0 and stages > 1)
        self.last_timeline = Timeline(((),))  # of this rank in the last run; waiting is between the steps
        self.loads: list[Tensor] = []  # of the last run, over its micro-batches, in the order of model.moe_layers()

    def run(self, batches: Sequence[Batch], objective: Objective, after_backward: Callable[[], None]) -> None:
        """Forward and backward pass of every micro-batch. Every rank has the whole of each.

        `after_backward` is called wherever gradients were added to parameters. Each of them gets those of the
        micro-batches in order.
        """
        if len(batches) != self.schedule.micro_batches:
            raise ValueError(f"{len(batches)} micro-batches for a schedule of {self.schedule.micro_batches}")
        work = _Work(self.model, self.flow, self.layers, batches, objective, self.kept)
        with deferrable(any(action.kind == "I" for steps in self.schedule.steps for step in steps for action in step)):
            self.last_timeline = self.execute(self.flow, work, batches, after_backward)
        self.loads = [load for stage in sorted(work.loads) for load in work.loads[stage]]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> list[Float[Tensor, "B T D"]] | None:
        """The hidden states after the last norm, where the last stage is; None elsewhere."""
        flow = Flow(_forward_only(self.schedule, len(batches)), self.group.place)
        work = _Work(self.model, flow, self.layers, batches, None, nullcontext)
        self.execute(flow, work, batches)
        return work.hidden if self.schedule.stages - 1 in self.held else None

    def execute(
        self,
        flow: Flow,
        compute: Compute,
        batches: Sequence[Batch],
        after_backward: Callable[[], None] = lambda: None,
    ) -> Timeline:
        """Run this rank's steps, with `compute` for each action, and return when each of them computed."""
        post = Post(self.group, flow, lambda parcel: self._empty(parcel, batches[parcel.micro_batch]))
        spans: list[tuple[float, float]] = []
        begin = time.perf_counter()
        for step in flow.schedule.steps[self.group.place]:
            works = [partial(compute, action, [post.take(p) for p in flow.needed(action)]) for action in step]
            start = time.perf_counter()
            found = self.courier.together(*works) if len(works) == 2 else (works[0](),)
            for action, tensors in zip(step, found, strict=True):
                for parcel, tensor in zip(flow.made(action), tensors, strict=True):
                    post.put(parcel, tensor)
            if step[-1].kind != "F":
                after_backward()
            spans.append((start - begin, time.perf_counter() - begin))
        post.finish()
        return Timeline((tuple(spans),))

    @property
    def busy(self) -> float:
        """Seconds of the last run in which this rank did not wait for another stage."""
        return sum(end - start for start, end in self.last_timeline.spans[0])

    def measured_times(self) -> dict[tuple[str, int], float]:
        """Median seconds of the last run's steps by (kind, stage), with after_backward; FB: a pair, by its forward."""
        found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        for step, (start, end) in zip(self.schedule.steps[self.group.place], self.last_timeline.spans[0], strict=True):
            found["".join(action.kind for action in step), step[0].stage].append(end - start)
        return {key: median(seconds) for key, seconds in found.items()}

    def sum_copies(self, gradients: dict[str, Tensor]) -> None:
        """Add up the gradients of a tied embedding, which two ranks hold, so that both have the same bits.

        gradients: those of the step, by parameter; changed in place. To be called on every rank.
        """
        ends = self.schedule.rank_of_stage[0], self.schedule.rank_of_stage[-1]
        if not self.tied or self.group.place not in ends:
            return
        own, group = gradients[EMBEDDING], self.group
        other, first = torch.empty_like(own), group.place == ends[0]
        place, what = ends[first], "gradients of a tied embedding"
        begin = (group.send, own), (group.receive, other)
        for work in [f(tensor, place, what) for f, tensor in (begin if first else reversed(begin))]:
            group.wait(work, what)
        own += other

    def _empty(self, parcel: Parcel, batch: Batch) -> Tensor:
        modules = (self.model.config.num_nextn_predict_layers,) if parcel.what.endswith(EMBEDDINGS) else ()
        # Hidden states have the dtype and the device of linears; a rank may have no layers, but an embedding or a head.
        like = next(p for name, p in self.model.named_parameters() if is_converted(name, p))
        return like.new_empty(*modules, *batch.inputs.shape, self.model.config.hidden_size)


def _forward_only(schedule: Schedule, micro_batches: int) -> Schedule:
    """Forward passes alone, on the same stages, in the order in which they can begin."""
    every = [Action("F", stage, m) for m in range(micro_batches) for stage in range(schedule.stages)]
    every.sort(key=lambda action: action.micro_batch + action.stage)
    ranks = schedule.rank_of_stage
    steps = tuple(tuple((a,) for a in every if ranks[a.stage] == rank) for rank in range(schedule.ranks))
    return Schedule("evaluation", schedule.ranks, schedule.stages, micro_batches, ranks, steps)
