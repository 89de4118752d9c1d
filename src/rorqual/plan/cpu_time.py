"""Seconds of a training step on this machine's processor: a sum of terms, each a count times a cost.

The costs are measured: `rorqual plan --calibrate` times real steps of small models (train/calibrate.py), fits the costs
to them, and keeps them for this machine. Before that they are those of an AMD EPYC (Zen 3), scaled by the speed of a
large product.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from rorqual import strict_json
from rorqual.files import write_text
from rorqual.model.config import ModelConfig
from rorqual.plan.activations import Kept, layer_bytes, mtp_bytes
from rorqual.plan.cost import flops_after_layers, flops_by_layer, mtp_parameters, parameters
from rorqual.plan.hardware import describe_machine, matrix_peak
from rorqual.plan.optimizer_state import muon_flops
from rorqual.plan.published_runs import Z80

# Measured on two cores of an AMD EPYC (Zen 3, AVX2) in FP32, whose product of two 1024² matrices reaches 163 GFLOP/s.
DEFAULT = {
    "products": 5.0e-12, "attention": 1.7e-11, "kept": 8.8e-10, "logits": 4.0e-9, "parameters": 4.8e-9,
    "layers": 3.3e-3, "experts": 2.4e-4,
}  # fmt: skip
DEFAULT_PEAK = 163e9
UNMEASURED = 0.4  # spread of the logarithm of a time, on a machine that has not been calibrated
VARIABLE = "RORQUAL_CALIBRATION"  # where the costs are kept, instead of in the user's cache


@dataclass(frozen=True)
class Counts:
    """Of a training step."""

    products: float  # FLOPs with weights
    attention: float  # FLOPs
    kept: float  # bytes that are kept for backward passes
    logits: float  # numbers
    parameters: float  # updated
    layers: float  # that run, over all micro-batches
    experts: float  # that run


@dataclass(frozen=True)
class Costs:
    """Seconds of one of each of `Counts`, with the spread of the logarithm of a time around their sum."""

    products: float
    attention: float
    kept: float
    logits: float
    parameters: float
    layers: float
    experts: float
    spread: float
    source: str

    def seconds(self, counts: Counts) -> float:
        return sum(getattr(self, name) * value for name, value in vars(counts).items())

    def interval(self, seconds: float) -> tuple[float, float]:
        """80 % around it."""
        factor = math.exp(Z80 * self.spread)
        return seconds / factor, seconds * factor


def step_counts(
    config: ModelConfig, micro_batches: Sequence[tuple[int, int]], itemsize: int, ahead: bool, recompute: str = "none",
    muon: bool = False,
) -> Counts:  # fmt: skip
    """micro_batches: (sequences, tokens of each). ahead: whether multi-token modules are trained. muon: or AdamW."""
    length = micro_batches[0][1]
    every, after = flops_by_layer(config, length), flops_after_layers(config, length, ahead)
    depth = config.num_nextn_predict_layers * ahead
    kinds = [config.is_moe_layer(i) for i in range(config.num_hidden_layers + depth)]
    how = Kept(itemsize)
    kept = sum(layer_bytes(config, moe, how) for moe in kinds) + depth * mtp_bytes(config, how)
    tokens = sum(rows * length for rows, length in micro_batches)
    passes = 4 if recompute == "full" else 3
    layers = passes * (sum(f.products for f in every) + after.products)
    return Counts(
        products=tokens * layers + (muon_flops(config) if muon else 0.0),
        attention=tokens * passes * (sum(f.attention for f in every) + after.attention),
        kept=tokens * kept,
        logits=tokens * (1 + depth) * config.vocab_size,
        parameters=parameters(config)[0] + mtp_parameters(config),
        layers=len(micro_batches) * len(kinds),
        experts=len(micro_batches) * sum(kinds) * (config.n_routed_experts or 0),
    )


def fit(measured: Sequence[tuple[Counts, float]], source: str) -> Costs:
    """The costs ≥ 0 with the least squared relative errors."""
    names = list(vars(measured[0][0]))
    # A relative error of each: rows are divided by the time.
    rows = torch.tensor([[getattr(c, n) / t for n in names] for c, t in measured], dtype=torch.float64)
    scale = rows.max(0).values.clamp(min=1e-300)
    rows = rows / scale
    found, target = _not_negative(rows, torch.ones(len(measured), dtype=torch.float64)), rows
    errors = (target @ found).clamp(min=1e-9).log()
    free = max(1, len(measured) - int((found > 0).sum()))
    spread = max(0.05, math.sqrt(float((errors**2).sum()) / free))
    return Costs(**dict(zip(names, (found / scale).tolist(), strict=True)), spread=spread, source=source)


def _not_negative(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares with coefficients ≥ 0, by Lawson and Hanson's active set."""
    count = rows.shape[1]
    active = torch.zeros(count, dtype=torch.bool)
    found = torch.zeros(count, dtype=rows.dtype)
    for _ in range(3 * count):
        gradient = rows.T @ (target - rows @ found)
        gradient[active] = -1
        if float(gradient.max()) < 1e-10 or bool(active.all()):
            break
        active[int(gradient.argmax())] = True
        while True:
            tried = torch.zeros_like(found)
            tried[active] = torch.linalg.lstsq(rows[:, active], target).solution
            if bool((tried[active] > 0).all()):
                found = tried
                break
            below = active & (tried <= 0)
            step = float((found[below] / (found[below] - tried[below])).min())
            found = found + step * (tried - found)
            active &= found > 1e-12
            found[~active] = 0
    return found


def costs_here(dtype: torch.dtype) -> Costs:
    """Those measured on this machine, else the defaults."""
    kept = _read().get(_key(dtype))
    try:
        return TypeAdapter(Costs).validate_python(kept)
    except ValidationError:
        pass
    scale = DEFAULT_PEAK / matrix_peak(dtype)
    costs = {name: value * scale for name, value in DEFAULT.items()}
    return Costs(**costs, spread=UNMEASURED, source="not calibrated on this machine (rorqual plan --calibrate)")


def keep(costs: Costs, dtype: torch.dtype) -> Path:
    """Raises UserError where it cannot be written."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, strict_json.dumps(_read() | {_key(dtype): asdict(costs)}, indent=1))
    return path


def _read() -> dict[str, Any]:
    """What is kept; a damaged file counts as none."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(dtype: torch.dtype) -> str:
    machine = describe_machine()
    parts = (machine["processor"], machine["threads"], machine["compiled_functions"], machine["torch"], dtype)
    return ", ".join(map(str, parts))


def _path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(VARIABLE) or cache / "rorqual" / "calibration.json")
