"""One rollout worker: a model of its own, which samples from the weights it is given. No Ray in here."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.sequence import Sequence
from rorqual.kernels.devices import find_device
from rorqual.model import ModelConfig
from rorqual.precision.rollout_twin import RolloutWeights
from rorqual.rl.rollout import Shard
from rorqual.rl.weight_push import Bytes, copy_bytes, sampling_model

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is built from; text and numbers only."""

    config: str  # ModelConfig's fields as JSON
    dtype: str  # as in recipes
    precision: str | None
    weights: RolloutWeights | None  # grpo.rollout_weights
    exact: bool
    record_routing: bool
    max_num_seqs: int
    threads: int
    device: str = "cpu"  # or a kind of GPU, of which Ray shows a worker its own alone


class _CountingEngine(Engine):
    steps = 0  # so far

    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        self.steps += 1
        return super().step(before_forward)


class RolloutWorker:
    """Samples shards of rollouts; `forwards` is called from another thread meanwhile."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """settings: the fields of WorkerSettings."""
        self.settings = WorkerSettings(**settings)
        torch.set_num_threads(self.settings.threads)
        config = ModelConfig(**json.loads(self.settings.config))
        dtype, device = getattr(torch, self.settings.dtype), find_device(self.settings.device)
        given = self.settings
        model = sampling_model(config, dtype, given.precision, given.weights, device, given.exact)
        self.engine = _CountingEngine(
            model, max_num_seqs=self.settings.max_num_seqs, record_routing=self.settings.record_routing
        )
        self.version: int | None = None

    def sample(
        self,
        version: int,
        weights: Mapping[str, Bytes],
        prompts: list[list[int]],
        params: dict[str, Any],
    ) -> dict[str, Array]:
        """Sample from `weights`, those after `version` steps, and return a Shard's tensors.

        params: fields of SamplingParams. Raises UserError for a prompt that fills the model's context.
        """
        start = time.monotonic()
        torch.set_num_threads(self.settings.threads)  # PyTorch counts them by thread
        if version != self.version:
            self.version = None
            copy_bytes(self.engine.model, weights)
            self.version = version
        completions = self.engine.generate(prompts, SamplingParams(**params))
        shard = Shard.of(completions, time.monotonic() - start, version)
        return {name: tensor.numpy() for name, tensor in shard.tensors().items()}

    def forwards(self) -> int:
        """Forward passes so far: a worker whose count stands still hangs."""
        return self.engine.steps  # a CUDA graph that is replayed runs no hook of the model


def shard_from(arrays: Mapping[str, Array]) -> Shard:
    """What `sample` returned; copied, since Ray's arrays are read-only memory of its object store."""
    return Shard(**{name: torch.tensor(array) for name, array in arrays.items()})
