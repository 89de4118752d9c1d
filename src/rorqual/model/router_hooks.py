"""Routers watched and overridden from outside, by hooks, so that the network stays as the papers write it.

T tokens of a forward pass, L mixture-of-experts layers of the main model, K experts a token.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.model.moe import MixtureOfExperts, Router
from rorqual.model.transformer import Transformer

Routed = tuple[Tensor, Tensor, Tensor]  # what a router returns: weights, chosen experts, scores
NOT_RECORDED = -1  # in place of the experts of a token


def routers(model: Transformer) -> list[Router]:
    """Of the main model's mixture-of-experts layers."""
    return [layer.mlp.gate for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]


@contextmanager
def choices_of(model: Transformer) -> Generator[list[Tensor]]:
    """The experts [T, K] that each router chooses, layer by layer, while the block runs."""
    chosen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Routed) -> None:
        chosen.append(output[1])

    with _hooked([(router, keep) for router in routers(model)]):
        yield chosen


@dataclass
class Replay:
    """Counts over tokens and layers of the passes of one replay."""

    replayed: int = 0
    differ: int = 0  # of those, where the router would have chosen another set of experts


@contextmanager
def replayed(model: Transformer, recorded: Tensor, counts: Replay) -> Generator[None]:
    """Every router takes the experts `recorded` [T, L, K] for its tokens, with gate weights from its own scores
    ("Keep Routing", V3.2 §3.1). Where NOT_RECORDED stands it chooses.

    The block includes the backward pass where that recomputes activations.
    """

    def override(layer: int) -> Callable[[Router, Any, Routed], Routed]:
        kept = recorded[:, layer].long()
        known = kept[:, :1] != NOT_RECORDED

        def hook(router: Router, _inputs: Any, output: Routed) -> Routed:
            _, own, scores = output
            chosen = torch.where(known, kept, own)
            counts.replayed += int(known.sum())
            counts.differ += int((chosen.sort(-1).values != own.sort(-1).values).any(-1).sum())
            return router.gate_weights(scores, chosen), chosen, scores

        return hook

    with _hooked([(router, override(layer)) for layer, router in enumerate(routers(model))]):
        yield


@contextmanager
def _hooked(hooks: list[tuple[Router, Callable[..., Routed | None]]]) -> Generator[None]:
    handles = [router.register_forward_hook(hook) for router, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
