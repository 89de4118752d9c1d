"""Seconds of a training step: products, memory traffic, travel to experts, the pipeline's bubble, sums over ranks.

Products take FLOPs / (peak · utilisation); the utilisation is calibrated on published runs (calibration.py) and stands
for what is not counted here. Everything else is bytes over a bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rorqual.model.config import ModelConfig
from rorqual.plan.activations import Kept, layer_bytes
from rorqual.plan.chips import Chip
from rorqual.plan.cost import cache_bytes_per_token, flops_after_layers, flops_by_layer, multi_token_kinds
from rorqual.plan.expected_rows import expected_rows, row_bytes
from rorqual.plan.layout import Job, Layout, held, schedule_of, stages, takes_turns
from rorqual.plan.simulate import Times, simulate

IMBALANCE = 0.2  # busiest expert over the mean, minus 1, of a batch with balancing biases (benchmarks/balance.py)
LINK_SHARE = 0.9  # of a link's rate that large messages reach; DeepEP reaches 153–158 of 160 GB/s, 43–58 of 50
GROUPED = 0.6  # of the utilisation of other products that those of experts reach: 0.30 of 0.49 on B200 (SimuMax)
FEW = 2  # micro-batches of a simulated pipeline, for each rank
PASSES = 3.0  # times that kept activations cross the memory's bus in a forward pass; twice as often in a backward pass
# That an update reads and writes for a parameter: the gradient, once for the norm of all, once for itself, and to zero
# it; master and two moments, there and back; the weight.
UPDATE_BYTES = 38.0
LAUNCH_SECONDS = 1e-4  # of a layer's kernels in a forward pass, some 20 of 5 µs; the chip waits where it is faster


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of all ranks, which add up to `total`."""

    products: float  # of the busiest rank
    attention: float
    memory: float
    tensor: float  # gathers and sums between ranks that share products, or a sequence
    launches: float  # of kernels, longer than they compute
    travel: float  # of tokens to experts, that nothing hides
    bubble: float  # without work, in a pipeline: waiting for others, and for slower ranks
    sums: float  # of gradients and weights over ranks, that nothing hides
    update: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Work:
    """Seconds of a micro-batch's forward pass in a stage."""

    products: float
    attention: float
    memory: float
    tensor: float  # of gathers and sums between ranks that share products, or a sequence
    travel: float
    launched: float  # of the processor that launches all of it

    @property
    def launches(self) -> float:
        """What the processor takes longer than the chip."""
        return max(0.0, self.launched - self.products - self.attention - self.memory - self.tensor)

    @property
    def computed(self) -> float:
        return self.products + self.attention + self.memory + self.tensor + self.launches


def step_time(job: Job, layout: Layout, chip: Chip, utilisation: float, imbalance: float = IMBALANCE) -> StepTime:
    """With the pipeline simulated. The layout must have passed `check`."""
    works, ranks = forward_work(job, layout, chip, utilisation, imbalance), _ranks(job, layout)
    number = layout.micro_batches(job.batch)
    again = _again(layout)
    busy = [0.0] * layout.pipeline
    for work, rank in zip(works, ranks, strict=True):
        busy[rank] += number * _both(work, layout, again)
    worst = max(range(layout.pipeline), key=busy.__getitem__)
    length = _pipeline_seconds(works, layout, number) if layout.pipeline > 1 else busy[worst]
    mine = [work for work, rank in zip(works, ranks, strict=True) if rank == worst]
    times = number * (3 + again)
    parts = ("products", "attention", "memory", "tensor", "launches")
    computed = {part: times * sum(getattr(work, part) for work in mine) for part in parts}
    return StepTime(
        **computed,
        travel=busy[worst] - sum(computed.values()),
        bubble=(length - busy[worst]) / layout.interleave,
        sums=_sums(job, layout, chip, busy[worst]),
        update=_update(job, layout, chip),
    )


def least_seconds(job: Job, layout: Layout, chip: Chip, utilisation: float, imbalance: float = IMBALANCE) -> float:
    """No more than `step_time(…).total`, without a simulation."""
    works, ranks = forward_work(job, layout, chip, utilisation, imbalance), _ranks(job, layout)
    number, again = layout.micro_batches(job.batch), _again(layout)
    busy = [0.0] * layout.pipeline
    for work, rank in zip(works, ranks, strict=True):
        busy[rank] += number * _both(work, layout, again)
    return max(busy) + _sums(job, layout, chip, max(busy)) + _update(job, layout, chip)


def forward_work(job: Job, layout: Layout, chip: Chip, utilisation: float, imbalance: float) -> list[Work]:
    """Of each stage."""
    config, tokens = job.config, layout.micro_batch * job.length / (layout.context * layout.tensor)
    parts, _ = stages(config, layout.schedule, layout.pipeline, layout.balanced)
    low, high = chip.rate(layout.precision) * utilisation, chip.rate(job.dtype) * utilisation
    # Products of the routed experts are smaller, and the busiest rank's are the ones that count.
    routed = _routed_flops(config) * ((1 + imbalance * (layout.experts > 1)) / GROUPED - 1)
    every = flops_by_layer(config, job.length)
    how = Kept(job.itemsize)
    kept = {moe: layer_bytes(config, moe, how) for moe in _kinds(config)}
    travel = tokens * _travel(config, layout, chip, job.itemsize) * (1 + imbalance)
    # A layer gathers its tokens before attention and before the feed-forward part, and scatters sums after each.
    split = 4 * tokens * (layout.tensor - 1) * config.hidden_size * job.itemsize / (LINK_SHARE * chip.within)
    split += tokens * _context_seconds(config, layout, chip, job.itemsize)
    expanded = _expanded_flops(config) * (Kept(job.itemsize, context=layout.context).seen - 1)
    found: list[Work] = []
    for stage, part in enumerate(parts):
        flops = [every[layer] for layer in part]
        mixtures = sum(config.is_moe_layer(layer) for layer in part)
        dense = len(part) - mixtures
        products, attention = sum(f.products for f in flops), sum(f.attention for f in flops)
        head = 0.0
        if stage == len(parts) - 1:
            after = flops_after_layers(config, job.length, job.ahead)
            depth = config.num_nextn_predict_layers * job.ahead
            head = 2.0 * (1 + depth) * config.vocab_size * config.hidden_size
            products, attention = products + after.products - head, attention + after.attention
            ahead = multi_token_kinds(config)[:depth]
            mixtures, dense = mixtures + sum(ahead), dense + depth - sum(ahead)
        crossing = PASSES * (mixtures * kept.get(True, 0.0) + dense * kept.get(False, 0.0))
        found.append(
            Work(
                products=tokens * ((products + mixtures * routed + (dense + mixtures) * expanded) / low + head / high),
                attention=tokens * attention / high,
                tensor=(dense + mixtures) * split,
                memory=tokens * crossing / chip.bandwidth,
                travel=mixtures * travel,
                launched=(dense + mixtures) * LAUNCH_SECONDS,
            )
        )
    return found


def _kinds(config: ModelConfig) -> tuple[bool, ...]:
    return (False, True) if config.n_routed_experts else (False,)


def _ranks(job: Job, layout: Layout) -> tuple[int, ...]:
    return stages(job.config, layout.schedule, layout.pipeline, layout.balanced)[1]


def _both(work: Work, layout: Layout, again: int) -> float:
    """Seconds of a micro-batch's forward and backward pass in a stage, in the middle of a step."""
    computed, travel = (3 + again) * work.computed, (2 + again) * work.travel
    return max(computed, travel) if _hides(layout) else computed + travel


def _hides(layout: Layout) -> bool:
    """Whether two micro-batches take turns, so that one's travel hides behind the other's computing."""
    return layout.schedule == "dualpipev" if layout.pipeline > 1 else takes_turns(layout)


def pipeline_times(
    job: Job, layout: Layout, chip: Chip, utilisation: float, imbalance: float = IMBALANCE
) -> Times | None:
    """Of a micro-batch in each stage, which `step_time` simulates the pipeline with; None without one."""
    if layout.pipeline == 1:
        return None
    return _times(forward_work(job, layout, chip, utilisation, imbalance), layout)


def few_micro_batches(pipeline: int, number: int) -> int:
    """Of a step's, those that are simulated: in the middle all are alike."""
    return min(number, FEW * pipeline + 2)


def _pipeline_seconds(works: Sequence[Work], layout: Layout, number: int) -> float:
    """From the first forward to the last backward pass."""
    few, times = few_micro_batches(layout.pipeline, number), _times(works, layout)
    length = simulate(schedule_of(layout.schedule, layout.pipeline, few), times).length
    if few == number:
        return length
    fewer = simulate(schedule_of(layout.schedule, layout.pipeline, few - 1), times).length
    return length + (number - few) * (length - fewer)


def _times(works: Sequence[Work], layout: Layout) -> Times:
    again = _again(layout)
    forward = [w.computed + w.travel for w in works]
    inputs = [
        w.products + 2 * w.attention + w.memory + w.tensor + w.launches + w.travel + again * f
        for w, f in zip(works, forward, strict=True)
    ]
    weights = [w.products + w.memory + w.tensor + w.launches for w in works]
    both = [i + w for i, w in zip(inputs, weights, strict=True)]
    pair = None
    if _hides(layout):
        # A forward overlaps the backward of the other stage of its rank.
        other = list(reversed(range(len(works))))
        pair = [
            max(works[s].computed + (2 + again) * works[o].computed, works[s].travel + (1 + again) * works[o].travel)
            for s, o in enumerate(other)
        ]
    return Times(forward, both, inputs, weights, pair)


def _again(layout: Layout) -> int:
    """Forward passes that a backward pass does again."""
    return 1 if layout.recompute == "full" else 0


@cache
def _routed_flops(config: ModelConfig) -> float:
    """Of a token's forward pass through the routed experts of a layer."""
    if not config.n_routed_experts:
        return 0.0
    moe = config.moe
    return 6.0 * config.hidden_size * moe.moe_intermediate_size * moe.num_experts_per_tok


def _expanded_flops(config: ModelConfig) -> float:
    """Of a token's keys and values of all heads, from its latent; ranks that share a sequence compute those of all
    tokens that they see."""
    if not config.is_mla:
        return 0.0
    mla = config.mla
    return 2.0 * mla.kv_lora_rank * config.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim)


def _context_seconds(config: ModelConfig, layout: Layout, chip: Chip, itemsize: int) -> float:
    """Of a token's part in a layer's gather of keys and values, in a pass. They are gathered in the forward pass, and
    their gradients go back in the backward pass, which counts as two."""
    width = cache_bytes_per_token(config, itemsize) / config.num_hidden_layers
    rate = chip.within if layout.context <= layout.per_node else chip.between
    return 2 / 3 * (layout.context - 1) * width / (LINK_SHARE * rate)


def _travel(config: ModelConfig, layout: Layout, chip: Chip, itemsize: int) -> float:
    """Seconds of a token's way to the experts of a layer and back; a backward pass takes as long."""
    if layout.experts == 1 or not config.n_routed_experts:
        return 0.0
    rows = expected_rows(config, layout.experts, min(layout.per_node, layout.experts), layout.dispatch)
    there, back = row_bytes(layout.dispatch, config.hidden_size, config.moe.num_experts_per_tok, itemsize)
    seconds = {
        "between nodes": rows.get("between nodes", 0.0) * (there + back) / (LINK_SHARE * chip.between),
        "within a node": rows.get("within a node", 0.0) * (there + back) / (LINK_SHARE * chip.within),
    }
    return max(seconds.values())  # both links carry at the same time


def _sums(job: Job, layout: Layout, chip: Chip, busy: float) -> float:
    """Of gradients to the rows' owners and of rows back, that nothing hides: half of ZeRO-1's, and what full sharding's
    take longer than all passes."""
    owners = layout.data * layout.context
    copies = owners // layout.experts
    number, seconds = layout.micro_batches(job.batch), []
    for own in held(job.config, layout.schedule, layout.pipeline, layout.balanced):
        shared, routed = own.shared / layout.tensor, own.routed / layout.experts / layout.tensor
        gathers = 2 * number if layout.sharding == "full" else 1
        a_rank = shared * (1 - 1 / owners) * (4 + gathers * job.itemsize)
        a_rank += routed * (1 - 1 / copies) * (4 + gathers * job.itemsize)
        rate = chip.between if owners > layout.per_node else chip.within
        seconds.append(a_rank / (LINK_SHARE * rate))
    most = max(seconds)
    if layout.sharding == "full":
        return max(0.0, most - busy)
    return most / 2 if layout.overlap else most


def _update(job: Job, layout: Layout, chip: Chip) -> float:
    owners = layout.data * layout.context
    copies = owners // layout.experts
    owned = max(
        own.shared / owners + own.routed / layout.experts / copies
        for own in held(job.config, layout.schedule, layout.pipeline, layout.balanced)
    )
    return owned / layout.tensor * UPDATE_BYTES / chip.bandwidth
