"""Exponential moving average of the master weights, kept on the CPU (V3 §3.2.3)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rorqual.train.optimizer import Optimizer

# torch._foreach_*: no public names exist, and the type stubs do not export these.


class EMA:
    """average ← decay·average + (1 − decay)·master after each step; FP32."""

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        self.average = {name: w.detach().to("cpu", copy=True) for name, w in optimizer.masters.items()}

    @torch.no_grad()
    def update(self) -> None:
        masters = [self.optimizer.masters[name].to("cpu") for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), masters, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the averaged weights."""
        parameters = self.optimizer.parameters
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            _fill(parameters, self.average)
            yield
        finally:
            _fill(parameters, own)

    def tensors(self) -> dict[str, Tensor]:
        return {f"ema.{name}": t for name, t in self.average.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, t in self.average.items():
            t.copy_(tensors[f"ema.{name}"])


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.data.copy_(values[name])
