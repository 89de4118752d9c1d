"""Weight gradients that are computed after the backward pass, not within it.

A backward pass then only computes what other pipeline stages wait for, the gradients of inputs; those of weights fill
the bubbles ("Zero Bubble Pipeline Parallelism", arXiv 2401.10241; DualPipe, V3 §3.2.1). The bits are the same.

    with deferrable():                          # functions that can defer, in place of torch's own that cannot
        loss = model(tokens).sum()
        with deferred_weight_gradients() as gradients:
            loss.backward()                     # linears leave their weights' .grad alone
        gradients.run()                         # adds them

Linears of every kind defer; norms, embedding and the head with its cross-entropy do not. Both settings hold for all
threads, because autograd runs a GPU's backward pass, and the forward pass that it repeats, in threads of its own.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Gradients = TypeVar("Gradients", bound=tuple[Tensor | None, ...])

_deferrable = False
_queue: "WeightGradients | None" = None


class WeightGradients:
    """Gradients of one backward pass that are due, in its order. They keep what they need alive."""

    def __init__(self) -> None:
        self._due: deque[tuple[tuple[Tensor | None, ...], Callable[[], tuple[Tensor | None, ...]]]] = deque()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, weights: tuple[Tensor | None, ...], compute: Callable[[], tuple[Tensor | None, ...]]) -> None:
        """compute: the gradient of each weight, None where there is none."""
        self._due.append((weights, compute))

    @torch.no_grad()
    def run(self) -> None:
        """Compute them, and add each to its weight's `.grad`."""
        while self._due:
            weights, compute = self._due.popleft()
            for weight, gradient in zip(weights, compute(), strict=True):
                if weight is None or gradient is None:
                    continue
                if weight.grad is None:
                    weight.grad = gradient
                else:
                    weight.grad += gradient


@contextmanager
def deferrable(on: bool = True) -> Generator[None]:
    """Context of forward passes, and of their backward passes, whose weight gradients may be deferred."""
    global _deferrable
    before, _deferrable = _deferrable, on
    try:
        yield
    finally:
        _deferrable = before


def is_deferrable() -> bool:
    return _deferrable


@contextmanager
def deferred_weight_gradients() -> Generator[WeightGradients]:
    """Context of one backward pass, of a forward pass in `deferrable()`; no other may run meanwhile."""
    global _queue
    assert _queue is None
    _queue = gradients = WeightGradients()
    try:
        yield gradients
    finally:
        _queue = None


def now_or_later(
    needed: bool, weights: tuple[Tensor | None, ...], compute: Callable[[], Gradients]
) -> Gradients | tuple[None, ...]:
    """For a backward function to return: the gradient of each weight, or None where it is computed later or not needed.

    weights: the parameters themselves, not as they come out of `saved_tensors`: under hooks those are others.
    """
    if needed and (_queue is None or any(weight is not None and not weight.is_leaf for weight in weights)):
        return compute()
    if needed and _queue is not None:
        _queue.add(weights, compute)
    return (None,) * len(weights)
