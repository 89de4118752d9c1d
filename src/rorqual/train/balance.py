"""Keeping the experts of a mixture evenly busy."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_correction_bias(model: nn.Module, loads: list[Tensor], speed: float) -> None:
    """b ← b + γ·sign(mean load − load) for every layer whose router has a correction bias (V3 §2.1.2).

    `loads` [E] tokens an expert got in the step, one a layer in `moe_layers()` order; multi-token layers, which
    come last, may be left out where they did not run. `speed` is γ.
    """
    for layer, load in zip(model.moe_layers(), loads, strict=False):
        bias = getattr(layer.gate, "e_score_correction_bias", None)
        if bias is not None:
            load = load.float()
            bias.add_((load.mean() - load).sign().to(bias.dtype), alpha=speed)


def max_violation(load: Tensor) -> float:
    """MaxVio: how far the busiest expert's load [E] is above the mean, as a fraction of it (LB §4.1)."""
    load = load.float()
    return float(load.max() / load.mean().clamp(min=1e-9) - 1)
