"""The tensors that rollouts are sampled with, as arrays that a rollout worker copies into a model of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.checkpoint.release_tensors import allocate, fp8_weights, meta_model, packed_weights
from rorqual.model import ModelConfig, Transformer
from rorqual.model.parameter_kinds import is_converted
from rorqual.precision.convert import convert
from rorqual.precision.exact import make_exact
from rorqual.precision.fp8_twin import rounded_names
from rorqual.precision.rollout_twin import RolloutWeights, twin_bytes, twin_of

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def sampling_model(
    config: ModelConfig,
    dtype: torch.dtype,
    precision: str | None,
    weights: RolloutWeights | None,
    device: torch.device | str = "cpu",
    exact: bool = False,
) -> Transformer:
    """A model like the one rollouts are sampled from, of zeros, without multi-token modules.

    precision: of products, as in the recipe. weights: of a twin (`grpo.rollout_weights`). exact: in the exact mode.
    """
    model = meta_model(config.replace(num_nextn_predict_layers=0))
    allocate(model, dtype, device)
    for name, p in model.named_parameters():
        p.data = torch.zeros_like(p, dtype=_dtype(name, p, dtype))
    for buffer in model.buffers():
        buffer.zero_()
    if precision is not None:
        convert(model, precision)
    if exact:
        make_exact(model)
    return model.eval() if weights is None else twin_of(model, weights, dtype).model


def sampling_tensors(model: Transformer) -> dict[str, Tensor]:
    """By name, without those of multi-token modules; a rounded weight is several."""
    later = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(len(model.mtp_modules)))
    tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, weight in fp8_weights(model):
        tensors |= {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales}
    for name, weight in packed_weights(model):
        tensors[f"{name}.data"] = weight.data
        if weight.channels is not None:
            tensors[f"{name}.channels"] = weight.channels
    return {name: t for name, t in tensors.items() if not name.startswith(later)}


def to_bytes(model: Transformer) -> dict[str, Bytes]:
    """What `sampling_tensors` gives, as bytes, since NumPy has no BF16; on a CPU, the tensors' own memory."""
    return {name: t.cpu().reshape(-1).view(torch.uint8).numpy() for name, t in sampling_tensors(model).items()}


def copy_bytes(model: Transformer, weights: Mapping[str, Bytes]) -> None:
    """Copy what `to_bytes` returned into a `sampling_model` in place, wherever it is. Raises ValueError for another
    model's.
    """
    tensors = sampling_tensors(model)
    if tensors.keys() != weights.keys():
        raise ValueError(f"the weights are another model's: {sorted(tensors.keys() ^ weights.keys())[:3]}")
    for name, tensor in tensors.items():
        # Ray's arrays are read-only, which tensors are not: each is copied on its way.
        tensor.copy_(torch.tensor(weights[name]).view(tensor.dtype).view(tensor.shape))


def push_bytes(config: ModelConfig, dtype: torch.dtype, weights: RolloutWeights | None) -> int:
    """Of one version of the weights of a model of these sizes."""
    own = config.replace(num_nextn_predict_layers=0)
    if weights in ("int8", "int4"):
        return twin_bytes(own, weights, dtype)
    model = meta_model(own)
    rounded = set[str]() if weights is None else rounded_names(model)
    parameters = ((name, p) for name, p in model.named_parameters() if name not in rounded)
    sizes = sum(p.numel() * _dtype(name, p, dtype).itemsize for name, p in parameters)
    return sizes + sum(b.nbytes for b in model.buffers()) + (0 if weights is None else twin_bytes(own, weights, dtype))


def _dtype(name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """As the optimizer keeps a parameter."""
    return dtype if is_converted(name, parameter) else torch.float32
