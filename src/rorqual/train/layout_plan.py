"""`--dry-run` of several processes: what each rank holds, computes and sends.

Each stage's part is the Trainer that its first rank would make, on the meta device: the same checks, cuts and formulas
as in a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.checkpoint.release_tensors import meta_model
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model import ModelConfig
from rorqual.parallel.cost import Bytes
from rorqual.parallel.mesh import planned_mesh, ranks_per_node
from rorqual.plan.activations import Kept, layer_bytes, mtp_bytes
from rorqual.plan.cost import Flops, Memory, flops_after_layers, flops_by_layer, loss_bytes
from rorqual.plan.expected_rows import Link
from rorqual.plan.quantity import quantity
from rorqual.plan.schedule import Schedule, one_f_one_b
from rorqual.plan.simulate import Times, simulate
from rorqual.recipe import PretrainRecipe, SFTRecipe
from rorqual.train.optimizer import Optimizer
from rorqual.train.traffic_report import LINKS, SHOWN, computed
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import micro_batches

FP32 = 4


@dataclass(frozen=True)
class RankPlan:
    """Of one rank, in a step. The ranks of a stage differ in what ZeRO-1 leaves to each, by a row of a tensor, or with
    Muon by a matrix.
    """

    rank: int
    layers: tuple[range, ...]  # of each of its stages
    parameters: int
    memory: Memory
    in_flight: int  # micro-batches × stages, at most, whose activations are held
    flops: float  # without what is computed again
    sent: Bytes
    idle: float  # share of its time without work; 0 without a pipeline


@dataclass(frozen=True)
class LayoutPlan:
    processes: int
    ranks_per_node: int
    micro_batches: int  # of each process
    micro_batch: int  # sequences
    length: int  # of a sequence
    tokens: int  # of a step, all processes
    ranks: tuple[RankPlan, ...]  # one of each pipeline rank
    sent: dict[tuple[str, Link], tuple[int, int, int]]  # bytes of a step: least and most of a rank, and all processes


def plan_layout(
    recipe: PretrainRecipe | SFTRecipe, config: ModelConfig, device: torch.device | str = "cpu"
) -> LayoutPlan:
    """The plan of a recipe's `[parallel]`, at its full batch size, in the dtype of `device`.

    Raises UserError as the run would.
    """
    section, train, length = recipe.parallel, recipe.train, recipe.data.sequence_length
    number, rows = micro_batches(train, section), -(-train.batch_size // section.data)
    size = min(train.micro_batch or rows, rows)
    tokens = rows * length // section.context  # of a rank
    dtype = dtype_name(compute_dtype(recipe.model.dtype, device))
    trainers = [_trainer(recipe, config, rank, number, dtype) for rank in planned_mesh(section, 0).pipeline.ranks]
    schedule, layers = one_f_one_b(1, number), (range(config.num_hidden_layers),)
    if pipeline := trainers[0].pipeline:
        schedule, layers = pipeline.schedule, pipeline.layers
    work = _flops(config, layers, length, bool(recipe.mtp.weight or recipe.mtp.final_weight))
    timeline = simulate(schedule, _times(work, recipe.recompute == "full"))
    # Without a pipeline, a micro-batch is in flight, or two that take turns.
    flying = 2 if pipeline is None and number > 1 and trainers[0].takes_turns else 1
    ranks: list[RankPlan] = []
    sent: list[Bytes] = []
    for place, trainer in enumerate(trainers):
        held = [stage for stage, rank in enumerate(schedule.rank_of_stage) if rank == place]
        by_rank = computed(trainer, tokens, (planned_mesh(section, rank) for rank in trainer.mesh.tokens.ranks))
        ranks.append(
            RankPlan(
                rank=trainer.mesh.rank,
                layers=tuple(layers[stage] for stage in held),
                parameters=sum(p.numel() for p in trainer.optimizer.parameters.values()),
                memory=_memory(recipe, trainer, schedule, layers, flying, size * length // section.context),
                in_flight=flying * round(schedule.peak_activations()[place]),
                flops=sum(3 * work[stage].forward for stage in held) * tokens,
                sent=by_rank[0],
                idle=timeline.bubble[place] / timeline.length,
            )
        )
        sent += by_rank
    keys: list[tuple[str, Link]] = [(what, link) for what in SHOWN for link in LINKS]
    found = {key: [of_rank[key] for of_rank in sent] for key in keys}
    return LayoutPlan(
        processes=section.processes,
        ranks_per_node=ranks_per_node(section),
        micro_batches=number,
        micro_batch=size,
        length=length,
        tokens=rows * section.data * length,
        ranks=tuple(ranks),
        sent={key: (min(n), max(n), sum(n)) for key, n in found.items() if any(n)},
    )


def _trainer(recipe: PretrainRecipe | SFTRecipe, config: ModelConfig, rank: int, number: int, dtype: str) -> Trainer:
    return Trainer(
        meta_model(config),
        recipe.optimizer,
        recipe.schedule,
        recipe.mtp,
        recipe.balance,
        dtype=dtype,
        precision=recipe.precision,
        recompute=recipe.recompute,
        mesh=planned_mesh(recipe.parallel, rank),
        micro_batches=number,
        notify=lambda _: None,
    )


def _memory(
    recipe: PretrainRecipe | SFTRecipe, trainer: Trainer, schedule: Schedule, layers: Sequence[range], flying: int,
    tokens: int,
) -> Memory:  # fmt: skip
    """flying: micro-batches for each that the schedule has in flight. tokens: of a micro-batch."""
    config, optimizer, size = trainer.model.config, trainer.optimizer, trainer.dtype.itemsize
    how = Kept(size, recipe.precision is not None, recipe.recompute, recipe.parallel.context)
    place = trainer.mesh.pipeline.place
    each = [sum(layer_bytes(config, config.is_moe_layer(layer), how) for layer in stage) for stage in layers]
    depth = config.num_nextn_predict_layers
    after = layer_bytes(config, config.is_moe_layer(config.num_hidden_layers), how) + mtp_bytes(config, how)
    each[-1] += depth * after
    if len(layers) > 1:  # stages keep what they send, the last what it gets; and multi-token modules' embeddings
        hidden = config.hidden_size * size
        each = [part + hidden for part in each]
        each[0] += depth * hidden
        each[-1] += depth * hidden
    state = optimizer.state_bytes()
    return Memory(
        weights=sum(t.nbytes for t in optimizer.held().values()) + _one_layer(optimizer, lambda p: p.nbytes),
        masters=state.masters,
        gradients=state.gradients + _one_layer(optimizer, lambda p: FP32 * p.numel()),
        moments=state.moments,
        ema=sum(FP32 * w.numel() for w in optimizer.masters.values()) if recipe.train.ema else 0,
        activations=round(flying * tokens * schedule.peak_activations(each)[place]),
        loss=loss_bytes(config, tokens, size) if schedule.rank_of_stage[-1] == place else 0,
    )


def _one_layer(optimizer: Optimizer, size: Callable[[Tensor], int]) -> int:
    """The most that a layer has of what full sharding holds whole of one layer at a time."""
    layers = optimizer.layers.modules if optimizer.layers else []
    return max((sum(map(size, parameters.values())) for _, parameters in layers), default=0)


def _flops(config: ModelConfig, layers: Sequence[range], length: int, ahead: bool) -> list[Flops]:
    """Of a token's forward pass, by stage."""
    every, after = flops_by_layer(config, length), flops_after_layers(config, length, ahead)
    parts = [[every[layer] for layer in stage] for stage in layers]
    parts[-1].append(after)
    return [Flops(sum(f.products for f in part), sum(f.attention for f in part)) for part in parts]


def _times(work: Sequence[Flops], again: bool) -> Times:
    """Of a schedule's actions, in FLOPs. again: the backward pass begins with a forward pass (recomputation)."""
    inputs = [f.products + 2 * f.attention + again * f.forward for f in work]
    both = [i + f.products for i, f in zip(inputs, work, strict=True)]
    return Times([f.forward for f in work], both, inputs, [f.products for f in work])


def layout_text(plan: LayoutPlan) -> str:
    """The plan as text."""
    ranks = plan.ranks
    last = next(rank for rank in ranks if rank.memory.loss)
    uses = [name for name in vars(last.memory) if any(getattr(rank.memory, name) for rank in ranks)]
    memory = [["rank", "layers", "parameters", *uses, "total"]]
    for rank in ranks:
        sizes = [quantity(getattr(rank.memory, name), "B") for name in uses]
        layers = ", ".join(map(_span, rank.layers))
        memory.append([str(rank.rank), layers, quantity(rank.parameters), *sizes, quantity(rank.memory.total, "B")])
    steps = [["rank", "compute", "idle", *(f"sent {link}" for link in LINKS)]]
    for rank in ranks:
        by_link = [quantity(sum(n for (_, where), n in rank.sent.items() if where == link), "B") for link in LINKS]
        steps.append([str(rank.rank), quantity(rank.flops, "FLOP"), f"{rank.idle:.0%}", *by_link])
    traffic = [["sent in a step", "a rank, at least", "at most", "all"]]
    for (what, link), numbers in plan.sent.items():
        traffic.append([f"{what}, {link}", *(quantity(n, "B") for n in numbers)])
    held = sorted({rank.in_flight for rank in ranks})
    return f"""\
layout       {plan.processes} processes, {plan.ranks_per_node} a node; in a step each has {plan.micro_batches} \
micro-batches of {plan.micro_batch} × {plan.length} tokens

{_table(memory)}
The other ranks of a stage hold as much. {_ends(ranks[0].rank, last.rank)}.
Activations are estimated: of {" or ".join(map(str, held))} micro-batches × stages in flight, with as many tokens for \
every expert. Loss: a chunk of
logits, and gradients of the head. Not counted: what libraries, messages and fragmentation take.

{_table(steps)}
In a step. Idle time (bubble {sum(rank.idle for rank in ranks) / len(ranks):.0%}) is simulated with FLOPs as times, \
without transfers; an overlapped pair takes as long as both.

{_table(traffic)}
To experts and back: with random routing."""


def _ends(first: int, last: int) -> str:
    after = "norm, head and multi-token modules"
    if first == last:
        return f"Rank {first} also has embedding, {after}"
    return f"Rank {first} also has the embedding, rank {last} {after}"


def _span(layers: range) -> str:
    return "–".join(map(str, sorted({layers[0], layers[-1]}))) if layers else "none"


def _table(rows: list[list[str]]) -> str:
    """Columns as wide as they need to be; the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
