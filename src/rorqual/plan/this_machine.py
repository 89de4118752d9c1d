"""This machine's processor as a chip, and the plan of a training on it.

A training step is a sum of measured costs (cpu_time.py). Sampling and serving are bounded as on any chip, by products
and memory traffic, with a wide interval.
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from rorqual.errors import UserError
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import HERE
from rorqual.plan.chips import Chip
from rorqual.plan.cpu_time import UNMEASURED, costs_here, step_counts
from rorqual.plan.estimate import Plan
from rorqual.plan.hardware import describe_machine, matrix_peak, memory_total
from rorqual.plan.layout import Layout
from rorqual.plan.process_memory import memory
from rorqual.plan.published_runs import Calibration
from rorqual.plan.quantity import quantity
from rorqual.plan.rl_here import RLPlan
from rorqual.plan.stage import Estimate, StagePlan
from rorqual.recipe import OptimizerSection, PretrainRecipe, Recipe, RewardRecipe, RLRecipe, SFTRecipe

MICRO_TOKENS = 8192  # of a forward pass in training, where no recipe says
COPY_BYTES = 1 << 26


@functools.cache
def chip_here() -> Chip:
    dtype = compute_dtype("auto")
    peaks = {"float32": matrix_peak(torch.float32)}
    peaks["bfloat16"] = matrix_peak(dtype) if dtype is torch.bfloat16 else peaks["float32"]
    machine = describe_machine()
    return Chip(
        name=f"{machine['processor']}, {machine['threads']} threads", family=HERE, peak=peaks,
        memory=float(memory_total()), bandwidth=_bandwidth(), per_node=1, source="measured",
    )  # fmt: skip


def calibration_here(chip: Chip) -> Calibration:
    """The share of the peak that products reach, as measured here."""
    dtype = compute_dtype("auto")
    costs = costs_here(dtype)
    share = min(1.0, 1 / (costs.products * chip.rate(dtype_name(dtype)))) if costs.products else 1.0
    return Calibration(share, UNMEASURED, costs.source)


def training_here(
    config: ModelConfig, kind: str, name: str, tokens: float, length: int, batch: int, moments: str, price: float | None
) -> StagePlan:
    """On one process. Raises UserError where it does not fit in memory."""
    chip, dtype = chip_here(), compute_dtype("auto")
    rows = max(1, min(batch, MICRO_TOKENS // length))
    optimizer = OptimizerSection.model_validate({"moments": moments})
    needed = memory(config, rows * length, dtype=dtype_name(dtype), optimizer=optimizer, accumulated=batch > rows)
    _check_room(name, needed.total, "--moments 8bit, or a --gpu")
    costs, ahead = costs_here(dtype), config.num_nextn_predict_layers > 0
    counts = step_counts(config, [(rows, length)] * max(1, batch // rows), dtype.itemsize, ahead)
    steps = tokens / (batch * length)
    seconds = costs.seconds(counts) * steps
    return StagePlan(
        kind=kind, name=name, config=config, chip=chip, chips=1, price=price, tokens=tokens,
        flops_per_token=(counts.products + counts.attention) / (batch * length),
        seconds=Estimate(seconds, *costs.interval(seconds)),
        parts={part: getattr(costs, part) * value * steps for part, value in vars(counts).items()},
        memory=_uses(asdict(needed)), layout=Layout(per_node=1, micro_batch=rows, precision=dtype_name(dtype)),
        assumptions=(costs.source, f"{batch} sequences of {length} tokens a step, {rows} a forward pass"),
        figures={"steps": steps, "seconds_a_step": seconds / steps, "tokens_per_second": tokens / seconds},
    )  # fmt: skip


def predicted_here(
    recipe: PretrainRecipe | SFTRecipe | RewardRecipe, config: ModelConfig, predicted: Plan, price: float | None,
    sampling: float = 0.0,
) -> StagePlan:  # fmt: skip
    """Of a recipe's run, from what its dry run says; sampling: seconds before it.

    Raises UserError where the length of the run is not known.
    """
    tokens, seconds = predicted["tokens"], predicted["seconds"]
    if tokens is None or seconds is None:
        raise UserError(
            f"{recipe.name}: train.epochs = {recipe.train.epochs:g}: how many steps those are is known once the data "
            "is packed; say train.steps instead"
        )
    rate, (slow, fast) = predicted["tokens_per_second"], predicted["tokens_per_second_interval"]
    ends = (seconds, seconds) if recipe.train.seconds is not None else (seconds * rate / fast, seconds * rate / slow)
    return _of_run(
        recipe, recipe.kind, config, price, tokens, Estimate(seconds + sampling, *(end + sampling for end in ends)),
        flops_per_token=predicted["flops_per_token"],
        parts={"training": seconds} | ({"sampling": sampling} if sampling else {}), memory=predicted["memory"],
        assumptions=(predicted["calibration"],), figures={"tokens_per_second": rate},
    )  # fmt: skip


def rl_predicted_here(recipe: RLRecipe, config: ModelConfig, predicted: RLPlan, price: float | None) -> StagePlan:
    needed = memory(
        config, recipe.grpo.micro_tokens, dtype=dtype_name(compute_dtype(recipe.model.dtype)),
        optimizer=recipe.optimizer, fp8=recipe.precision is not None, recompute=recipe.recompute, accumulated=True,
        lora=recipe.lora,
    )  # fmt: skip
    steps = predicted["steps"]
    parts = {part: steps * seconds for part, seconds in predicted["parts"].items() if seconds}
    if predicted["evaluation_seconds"]:
        parts["evaluation"] = predicted["evaluation_seconds"]
    return _of_run(
        recipe, recipe.kind, config, price, predicted["tokens"],
        Estimate(predicted["seconds"], *predicted["seconds_interval"]),
        flops_per_token=predicted["flops"] / predicted["tokens"], parts=parts, memory=asdict(needed),
        assumptions=(predicted["calibration"], *predicted["assumptions"]),
        figures={name: predicted[name] for name in ("steps", "seconds_a_step", "tokens_per_second", "mean_length")},
    )  # fmt: skip


def _of_run(
    recipe: Recipe, kind: str, config: ModelConfig, price: float | None, tokens: float, seconds: Estimate,
    memory: Mapping[str, int], **more: Any,
) -> StagePlan:  # fmt: skip
    used = _uses(memory)
    _check_room(recipe.name, sum(used.values()), "smaller micro-batches, or a --gpu")
    return StagePlan(
        kind=kind, name=recipe.name, config=config, chip=chip_here(), chips=1, price=price, tokens=tokens,
        seconds=seconds, memory=used, **more,
    )  # fmt: skip


def _uses(memory: Mapping[str, int]) -> dict[str, float]:
    """Without what is not there at the same time: it is of the update, which finds room where activations were."""
    used = {use: float(size) for use, size in memory.items() if use not in ("total", "apart")}
    return used | {"update": used.get("update", 0.0) + memory.get("apart", 0)}


def _check_room(name: str, needed: float, remedy: str) -> None:
    room = chip_here().memory
    if needed > room:
        raise UserError(
            f"{name or 'the model'} does not fit on this machine: training needs {quantity(needed, 'B')}, "
            f"{quantity(needed - room, 'B')} more than it has; try {remedy}"
        )


def _bandwidth() -> float:
    """Bytes/s of memory that a copy reads and writes; the best of several."""
    source = torch.ones(COPY_BYTES // 4)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best
