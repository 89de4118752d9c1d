"""Expert load balancing (V3 §2.1.2)."""

import torch
from torch import Tensor

from rorqual.model import Transformer


@torch.no_grad()
def update_correction_bias(model: Transformer, loads: list[Tensor], speed: float) -> None:
    """b ← b + γ·sign(mean load − load) for every layer whose router has a correction bias (V3 §2.1.2).

    `loads`: per MoE layer, in `moe_layers()` order, the tokens [E] that each expert got in the step; MTP layers, which
    come last, may be missing where they did not run. `speed` is γ.
    """
    for layer, load in zip(model.moe_layers(), loads, strict=False):
        bias = getattr(layer.gate, "e_score_correction_bias", None)
        if bias is not None:
            load = load.float()
            bias.add_((load.mean() - load).sign().to(bias.dtype), alpha=speed)


def max_violations(loads: list[Tensor]) -> list[float]:
    """MaxVio = max(load) / mean(load) − 1 of each layer's expert load [E] (LB §4.1)."""
    floats = [load.float() for load in loads]
    found = [load.max() / load.mean().clamp(min=1e-9) - 1 for load in floats]
    return torch.stack(found).tolist() if found else []  # one wait for a GPU
