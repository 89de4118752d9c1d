"""What a layout holds on each rank: parameters and bytes of training, from the sizes alone.

train/layout_plan.py builds the ranks of one layout on the meta device and counts the same; the two are compared in
tests/train/test_layout_plan.py. This is fast enough to search thousands of layouts.
"""

from dataclasses import dataclass, replace
from functools import cache

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.activations import Kept, layer_bytes, mtp_bytes
from rorqual.plan.cost import (
    LayerParameters,
    Memory,
    layer_parameters,
    loss_bytes,
    multi_token_kinds,
    multi_token_parameters,
)
from rorqual.plan.schedule import SCHEDULES, Schedule, one_f_one_b
from rorqual.plan.stage_layers import layers_of_stages, split
from rorqual.sections import ParallelSection

FP32 = 4
BLOCK = 256  # numbers of an 8-bit moment that share a scale, as kernels/adamw.py
MOMENTS = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2.0 + 2 * FP32 / BLOCK}  # bytes a parameter, of two


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the layout."""

    config: ModelConfig
    length: int  # tokens of a sequence
    batch: int  # sequences of a step
    ahead: bool = True  # whether multi-token modules are trained
    dtype: str = "bfloat16"  # in memory
    moments: str = "float32"
    ema: bool = False

    def __post_init__(self) -> None:
        """Without what is no size, so that results can be kept by config."""
        sizes = replace(self.config, rope_scaling=None, eos_token_id=None)
        object.__setattr__(self, "config", sizes)

    @property
    def itemsize(self) -> int:
        return FP32 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Layout:
    """As in a recipe's [parallel], with what else decides on memory and time."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    experts: int = 1
    tensor: int = 1  # ranks that share each product; other engines have it, ours has not
    interleave: int = 1  # runs of layers a rank has in 1f1b, which divide its bubble; as `tensor`
    # Other engines can do without: travel and sums behind computing, outside of dualpipev; stages of as much work, the
    # head included, instead of as many layers.
    overlap: bool = True
    balanced: bool = True
    per_node: int = 8
    micro_batch: int = 1  # sequences
    schedule: str = "dualpipev"
    sharding: str = "zero-1"
    dispatch: str = "two-hop"
    precision: str = "bfloat16"  # of products: float32, bfloat16 or fp8
    recompute: str = "none"

    @property
    def chips(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    def micro_batches(self, batch: int) -> int:
        """Of each rank in a step."""
        return batch // self.data // self.micro_batch


def check(layout: Layout, job: Job) -> str | None:
    """Why the layout is not possible; None if it is."""
    config = job.config
    ranks = layout.data * layout.context
    experts = config.moe.n_routed_experts if config.n_routed_experts else 1
    if ranks % layout.experts or experts % layout.experts:
        return f"{experts} experts on {layout.experts} of {ranks} ranks"
    if job.batch % (layout.data * layout.micro_batch):
        return f"{job.batch} sequences in micro-batches of {layout.micro_batch} on {layout.data} ranks"
    if job.length % (2 * layout.context):
        return f"{job.length} tokens in {2 * layout.context} pieces"
    if layout.sharding == "full" and layout.pipeline > 1:
        return "full sharding in a pipeline"
    if layout.pipeline == 1:
        return None
    try:
        stages(config, layout.schedule, layout.pipeline, layout.balanced)
        # The error is for too few micro-batches, and few are soon written.
        number = min(layout.micro_batches(job.batch), 2 * layout.pipeline)
        schedule_of(layout.schedule, layout.pipeline, number)
    except UserError as e:
        return str(e)
    return None


@cache
def schedule_of(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule; one rank runs its micro-batches one after the other. Raises UserError for too few micro-batches."""
    return one_f_one_b(1, micro_batches) if ranks == 1 else SCHEDULES[name](ranks, micro_batches)


@cache
def stages(
    config: ModelConfig, schedule: str, ranks: int, balanced: bool = True
) -> tuple[tuple[range, ...], tuple[int, ...]]:
    """Layers of each stage, and its rank."""
    if ranks == 1:
        return (range(config.num_hidden_layers),), (0,)
    found = schedule_of(schedule, ranks, 2 * ranks)
    if balanced:
        return layers_of_stages(config, found), found.rank_of_stage
    return split([1] * config.num_hidden_layers, found.stages), found.rank_of_stage


@dataclass(frozen=True)
class Held:
    """Parameters of a rank's stages."""

    layers: tuple[LayerParameters, ...]  # also of multi-token modules
    outside: int  # embedding, last norm and head

    @property
    def shared(self) -> int:
        """All but routed experts."""
        return self.outside + sum(layer.shared for layer in self.layers)

    @property
    def routed(self) -> int:
        """Of routed experts, over all ranks that share them."""
        return sum(layer.routed for layer in self.layers)


@cache
def held(config: ModelConfig, schedule: str, pipeline: int, balanced: bool = True) -> tuple[Held, ...]:
    """By pipeline rank."""
    layers, ranks = stages(config, schedule, pipeline, balanced)
    of_rank: list[list[LayerParameters]] = [[] for _ in range(pipeline)]
    kinds = {moe: layer_parameters(config, moe) for moe in {False, bool(config.n_routed_experts)}}
    for part, rank in zip(layers, ranks, strict=True):
        of_rank[rank] += [kinds[config.is_moe_layer(layer)] for layer in part]
    of_rank[ranks[-1]] += multi_token_parameters(config)
    outside, table = [0] * pipeline, config.vocab_size * config.hidden_size
    outside[ranks[0]] += table
    outside[ranks[-1]] += config.hidden_size
    if not config.tie_word_embeddings or ranks[0] != ranks[-1]:
        outside[ranks[-1]] += table
    return tuple(Held(tuple(own), more) for own, more in zip(of_rank, outside, strict=True))


def memory_by_rank(job: Job, layout: Layout) -> list[Memory]:
    """Bytes of each pipeline rank; its other ranks hold as much."""
    size, tensor = job.itemsize, layout.tensor
    owners = layout.data * layout.context
    copies = owners // layout.experts
    kept = activations(job, layout)
    found = []
    for rank, own in enumerate(held(job.config, layout.schedule, layout.pipeline, layout.balanced)):
        shared, routed = own.shared / tensor, own.routed / layout.experts / tensor
        resident, owned = shared + routed, shared / owners + routed / copies
        if layout.sharding == "full":  # of one layer at a time all rows
            largest = max((layer.shared + layer.routed / layout.experts for layer in own.layers), default=0)
            resident = owned + own.outside / tensor * (1 - 1 / owners) + largest / tensor
        masters = FP32 * owned if size < FP32 else 0
        last = rank == _rank_of_last(job, layout)
        found.append(
            Memory(
                weights=round(size * resident),
                masters=round(masters),
                gradients=round(FP32 * resident),
                moments=round(MOMENTS[job.moments] * owned),
                ema=round(FP32 * owned) if job.ema else 0,
                activations=round(kept[rank]),
                loss=loss_bytes(job.config, _tokens(job, layout), size, tensor) if last else 0,
            )
        )
    return found


def activations(job: Job, layout: Layout) -> list[float]:
    """Bytes that each pipeline rank keeps for backward passes, at most."""
    number = layout.micro_batches(job.batch)
    together = 2 if takes_turns(layout) and number > 1 else 1
    how = Kept(job.itemsize, layout.precision == "fp8", layout.recompute, layout.context)
    if layout.pipeline == 1:
        return [together * _tokens(job, layout) * _kept(job.config, how, "1f1b", 1, 1)[0]]
    # No more are in flight with more micro-batches than this.
    number = min(number, 4 * layout.pipeline)
    kept = _kept(job.config, how, layout.schedule, layout.pipeline, number, layout.balanced)
    return [_tokens(job, layout) * n for n in kept]


@cache
def _kept(
    config: ModelConfig, how: Kept, schedule: str, pipeline: int, micro_batches: int, balanced: bool = True
) -> tuple[float, ...]:
    """Bytes a token of a micro-batch, by rank."""
    parts, _ = stages(config, schedule, pipeline, balanced)
    by_kind = {moe: layer_bytes(config, moe, how) for moe in {False, bool(config.n_routed_experts)}}
    each = [sum(by_kind[config.is_moe_layer(layer)] for layer in part) for part in parts]
    depth = config.num_nextn_predict_layers
    each[-1] += sum(by_kind[moe] + mtp_bytes(config, how) for moe in multi_token_kinds(config))
    if pipeline > 1:
        hidden = config.hidden_size * how.size
        each = [part + hidden for part in each]
        each[0] += depth * hidden
        each[-1] += depth * hidden
    return schedule_of(schedule, pipeline, micro_batches).peak_activations(each)


def takes_turns(layout: Layout) -> bool:
    """Whether two micro-batches take turns without a pipeline, one computing while the other's tokens travel."""
    return layout.overlap and layout.experts > 1 and layout.sharding == "zero-1"


def _tokens(job: Job, layout: Layout) -> int:
    """Of a micro-batch on a rank, as if ranks that share products shared its tokens (sequence parallelism)."""
    return layout.micro_batch * job.length // (layout.context * layout.tensor)


def _rank_of_last(job: Job, layout: Layout) -> int:
    return stages(job.config, layout.schedule, layout.pipeline, layout.balanced)[1][-1]


def of_section(section: ParallelSection, micro_batch: int, per_node: int, precision: str, recompute: str) -> Layout:
    """The layout of a recipe."""
    return Layout(
        pipeline=section.pipeline, data=section.data, context=section.context, experts=section.experts,
        per_node=section.ranks_per_node or per_node, micro_batch=micro_batch, schedule=section.schedule,
        sharding=section.sharding, dispatch=section.dispatch, precision=precision, recompute=recompute,
    )  # fmt: skip
