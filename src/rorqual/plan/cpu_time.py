"""Seconds of a training step on this machine's processor: a sum of terms, each a count times a cost.

The costs are measured: `rorqual plan --calibrate` times real steps of small models (train/calibrate.py), fits the costs
to them, and keeps them for this machine. Before that they are those of an AMD EPYC (Zen 3), scaled by the speed of a
large product.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from rorqual.model.config import ModelConfig
from rorqual.plan.activations import Kept, layer_bytes, mtp_bytes
from rorqual.plan.cost import flops_after_layers, flops_by_layer, mtp_parameters, parameters
from rorqual.plan.fitting import Fitted
from rorqual.plan.hardware import matrix_peak
from rorqual.plan.measured_here import keep_entry, read_entry
from rorqual.plan.optimizer_state import muon_flops, muon_numbers

# Measured on two cores of an AMD EPYC (Zen 3, AVX2) in FP32, whose product of two 1024² matrices reaches 163 GFLOP/s.
DEFAULT = {
    "products": 5.0e-12, "attention": 1.7e-11, "kept": 8.8e-10, "logits": 4.0e-9, "parameters": 4.8e-9,
    "layers": 3.3e-3, "experts": 2.4e-4, "orthogonalised": 4.0e-8,
}  # fmt: skip
DEFAULT_PEAK = 163e9
UNMEASURED = 0.4  # spread of the logarithm of a time, on a machine that has not been calibrated
NOT_CALIBRATED = "not calibrated on this machine (rorqual plan --calibrate)"


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
    orthogonalised: float  # numbers in matrices that Muon updates, whose products are small


@dataclass(frozen=True)
class Costs(Fitted):
    """Seconds of one of each of `Counts`."""

    products: float
    attention: float
    kept: float
    logits: float
    parameters: float
    layers: float
    experts: float
    orthogonalised: float


def step_counts(
    config: ModelConfig, micro_batches: Sequence[tuple[float, int]], itemsize: int, ahead: bool,
    recompute: str = "none", muon: bool = False, adapters: int | None = None,
) -> Counts:  # fmt: skip
    """micro_batches: (sequences, tokens of each). ahead: whether multi-token modules are trained. muon: or AdamW.

    adapters: parameters of LoRA, whose small products are not counted; the weights below then need no gradients. None:
    all parameters are trained.
    """
    length = micro_batches[0][1]
    every, after = flops_by_layer(config, length), flops_after_layers(config, length, ahead)
    depth = config.num_nextn_predict_layers * ahead
    kinds = [config.is_moe_layer(i) for i in range(config.num_hidden_layers + depth)]
    how = Kept(itemsize)
    kept = sum(layer_bytes(config, moe, how) for moe in kinds) + depth * mtp_bytes(config, how)
    tokens = sum(rows * length for rows, length in micro_batches)
    passes = 4 if recompute == "full" else 3
    layers = (passes - (adapters is not None)) * (sum(f.products for f in every) + after.products)
    return Counts(
        products=tokens * layers + (muon_flops(config) if muon else 0.0),
        attention=tokens * passes * (sum(f.attention for f in every) + after.attention),
        kept=tokens * kept,
        logits=tokens * (1 + depth) * config.vocab_size,
        parameters=parameters(config)[0] + mtp_parameters(config) if adapters is None else adapters,
        layers=len(micro_batches) * len(kinds),
        experts=len(micro_batches) * sum(kinds) * (config.n_routed_experts or 0),
        orthogonalised=muon_numbers(config) if muon else 0.0,
    )


def costs_here(dtype: torch.dtype) -> Costs:
    """Those measured on this machine, else the defaults."""
    try:
        return TypeAdapter(Costs).validate_python(read_entry(dtype))
    except ValidationError:
        pass
    return Costs(**expected_costs(dtype), spread=UNMEASURED, source=NOT_CALIBRATED)


def expected_costs(dtype: torch.dtype) -> dict[str, float]:
    """The defaults, scaled by the speed of a large product."""
    scale = DEFAULT_PEAK / matrix_peak(dtype)
    return {name: value * scale for name, value in DEFAULT.items()}


def keep(costs: Costs, dtype: torch.dtype) -> Path:
    """Raises UserError where it cannot be written."""
    return keep_entry(dtype, asdict(costs))
