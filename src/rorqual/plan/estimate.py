"""Predict the cost of a training recipe on this machine."""

from dataclasses import asdict, replace
from typing import Any, TypedDict

import torch

from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.model.config import ModelConfig
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token, mtp_parameters, parameters
from rorqual.plan.cpu_time import Counts, costs_here, step_counts
from rorqual.plan.fitting import interval
from rorqual.plan.hardware import describe_machine, matrix_peak, memory_total
from rorqual.plan.optimizer_state import adapter_parameters
from rorqual.plan.process_memory import memory
from rorqual.plan.quantity import quantity
from rorqual.plan.rehearsal import kept_training
from rorqual.recipe import PretrainRecipe, SFTRecipe

EMULATED = 1.4  # times as long as without that a step takes whose products are rounded here (benchmarks/fp8_memory.py)


class Plan(TypedDict):
    """What a run is predicted to cost; the key `tokens`, `flops` or `seconds` is None where it is not known yet."""

    parameters_total: int
    parameters_active: int  # per token
    parameters_mtp: int  # of the modules for multi-token prediction, not in the total
    tokens: float | None
    flops_per_token: float
    flops: float | None
    memory: dict[str, int]  # bytes by use (`cost.Memory`), and `total`
    memory_machine: int  # bytes
    tokens_per_second: float
    tokens_per_second_interval: tuple[float, float]  # 80 %
    seconds: float | None
    utilisation: float  # fraction of the peak
    calibration: str  # what the time is from
    matrix_peak_flops: float  # FLOP/s of a matmul
    machine: dict[str, Any]


def predict(
    config: ModelConfig, recipe: PretrainRecipe | SFTRecipe, rows: int | None = None,
    device: torch.device | str = "cpu", computed: ModelConfig | None = None,
) -> Plan:  # fmt: skip
    """Parameters, FLOPs, bytes and seconds of a run. On a GPU, seconds are not known: those given are of the CPU.

    rows: in an epoch of packed data; None (not packed yet): tokens, flops and seconds are None where the run's length
    is given in epochs. computed: sizes of what is computed, where there is no language head; None: `config`.
    """
    headless, computed = computed is not None, computed or config
    section, length = recipe.train, recipe.data.sequence_length
    total, active = parameters(config)
    lora = recipe.lora if isinstance(recipe, SFTRecipe) else None
    each = flops_per_token(computed, length, frozen=lora is not None)
    if recipe.mtp.weight or recipe.mtp.final_weight:
        each += mtp_flops_per_token(config, length, lora is not None)
    dtype = compute_dtype(recipe.model.dtype, device)
    ahead = bool(recipe.mtp.weight or recipe.mtp.final_weight)
    step, costs = _step(computed, recipe, ahead), costs_here(dtype)
    peak, tokens_a_step = matrix_peak(dtype), section.batch_size * length
    rehearsed = kept_training(recipe)
    if rehearsed is not None:
        rate, spread = rehearsed.tokens_per_second, rehearsed.noise
        source = f"rehearsed in {len(rehearsed.seconds)} steps on this machine"
    else:
        rate = tokens_a_step / costs.seconds(step) / (EMULATED if recipe.precision else 1.0)
        spread, source = costs.spread, costs.source
    tokens: float | None = None
    on_cpu = torch.device(device).type == "cpu"
    if section.seconds is not None:
        tokens = section.seconds * rate if on_cpu else None
    elif section.steps is not None:
        first, until = section.batch_ramp or (section.batch_size, 0.0)
        average = section.batch_size + (first - section.batch_size) * min(until, 1.0) / 2
        tokens = section.steps * average * length
    elif section.epochs is not None and rows is not None:
        tokens = section.epochs * rows * length
    sequences = section.micro_batch or section.batch_size
    needed = memory(
        config,
        sequences * length,
        dtype=dtype_name(dtype),
        optimizer=recipe.optimizer,
        ema=section.ema is not None and on_cpu,  # the average is on the CPU
        fp8=recipe.precision is not None,
        recompute=recipe.recompute,
        accumulated=sequences < section.batch_size,
        lora=lora,
    )
    needed = replace(needed, loss=0) if headless else needed
    return {
        "parameters_total": total,
        "parameters_active": active,
        "parameters_mtp": mtp_parameters(config),
        "tokens": tokens,
        "flops_per_token": each,
        "flops": None if tokens is None else tokens * each,
        "memory": asdict(needed) | {"total": needed.total},
        "memory_machine": memory_total(str(device)),
        "tokens_per_second": rate,
        "tokens_per_second_interval": interval(rate, spread),
        "seconds": None if tokens is None else tokens / rate,
        "utilisation": rate * each / peak,
        "calibration": source,
        "matrix_peak_flops": peak,
        "machine": describe_machine(),
    }


def _step(config: ModelConfig, recipe: PretrainRecipe | SFTRecipe, ahead: bool) -> Counts:
    """Of a step with the full batch, on one process."""
    section, length = recipe.train, recipe.data.sequence_length
    size = min(section.micro_batch or section.batch_size, section.batch_size)
    whole, rest = divmod(section.batch_size, size)
    micro_batches = [(size, length)] * whole + [(rest, length)] * (rest > 0)
    itemsize, muon = compute_dtype(recipe.model.dtype).itemsize, recipe.optimizer.name == "muon"
    lora = recipe.lora if isinstance(recipe, SFTRecipe) else None
    adapters = None if lora is None else adapter_parameters(config, lora)
    return step_counts(config, micro_batches, itemsize, ahead, recipe.recompute, muon, adapters)


def plan_text(plan: Plan, timed: bool = True) -> str:
    """The plan of one process on this machine as text; `timed`: on its CPU."""
    needed = {name: size for name, size in plan["memory"].items() if size and name not in ("total", "apart")}
    parts = ", ".join(f"{name} {quantity(size, 'B')}" for name, size in needed.items())
    if plan["memory"]["apart"]:
        parts += f"; {quantity(-plan['memory']['apart'], 'B')} of this not at the same time"
    total, machine = quantity(plan["memory"]["total"], "B"), quantity(plan["memory_machine"], "B")
    fits = f"{run_text(plan)}\nmemory       {total} of {machine} ({parts})"
    if not timed:
        return f"{fits}\ntime         not predicted on this GPU; rorqual plan RECIPE --gpu NAME predicts known ones"
    peak = quantity(plan["matrix_peak_flops"], "FLOP/s")
    speed = f"{quantity(plan['tokens_per_second'])} tokens/s at {plan['utilisation']:.0%} of {peak}"
    if plan["seconds"] is None:
        time = f"{speed}; the length of an epoch is known once the data is packed"
    else:
        slow, fast = plan["tokens_per_second_interval"]
        low, high = (duration(plan["seconds"] * plan["tokens_per_second"] / rate) for rate in (fast, slow))
        time = f"about {duration(plan['seconds'])} ({low} to {high}): {speed}"
    time += f"\n{'':<13}{plan['calibration']}"
    return f"{fits}\ntime         {time}"


def run_text(plan: Plan) -> str:
    """The part of the plan that is the same for any number of processes."""
    lines = [
        f"parameters   {quantity(plan['parameters_total'])}, {quantity(plan['parameters_active'])} active per token",
        f"compute      {quantity(plan['flops_per_token'], 'FLOP')} per training token",
    ]
    if plan["parameters_mtp"]:
        lines[0] += f", and {quantity(plan['parameters_mtp'])} for multi-token prediction"
    if plan["tokens"] is not None and plan["flops"] is not None:
        lines.append(f"run          {quantity(plan['tokens'])} tokens, {quantity(plan['flops'], 'FLOP')}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """100 → "100 seconds", 600 → "10 minutes"."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
