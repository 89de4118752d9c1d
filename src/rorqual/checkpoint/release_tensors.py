"""Tensor names of releases, and the model's tensors by these names.

In memory the routed experts of a layer are stacked, and multi-token modules share embedding and head with the main
model; on disk every expert has its own tensors and every module its copies.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from rorqual.checkpoint.fp8_blocks import SCALE_SUFFIX
from rorqual.errors import UserError
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

NetworkT = TypeVar("NetworkT", bound=Transformer)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def release_tensors(model: Transformer) -> dict[str, Tensor]:
    """Release name → tensor; experts are views of their stack, shared tensors appear twice.

    An FP8 weight is an E4M3 tensor and its scales.
    """
    return own_tensors(model) | shared_copies(model)


def own_tensors(module: nn.Module, prefix: str = "", first_expert: int = 0) -> dict[str, Tensor]:
    """first_expert: the number of the first expert of every stack."""
    out: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
        out |= _by_expert(name, tensor.detach(), first_expert)
    for name, weight in fp8_weights(module, prefix):
        one = len(weight) == 1 and ".experts." not in name
        for suffix, stack in (("", weight.codes.view(torch.float8_e4m3fn)), (SCALE_SUFFIX, weight.scales)):
            out |= {own + suffix: t for own, t in _by_expert(name, stack[0] if one else stack, first_expert).items()}
    return out


def _by_expert(name: str, tensor: Tensor, first: int) -> dict[str, Tensor]:
    """A parameter by its release names, of which a stack of experts has several."""
    layer, _, stack = name.rpartition(".experts.")
    if stack == "gate_up_proj":
        return {
            f"{layer}.experts.{e}.{part}.weight": half
            for e, expert in enumerate(tensor, first)
            for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
        }
    if stack == "down_proj":
        return {f"{layer}.experts.{e}.down_proj.weight": expert for e, expert in enumerate(tensor, first)}
    return {name: tensor}


def fp8_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, FP8Weight]]:
    """Parameter name → weight, of those that are in FP8."""
    for path, part in module.named_modules(prefix=prefix):
        for name, weight in vars(part).items():
            if isinstance(weight, FP8Weight):
                yield f"{path}.{name}", weight


def packed_weights(module: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Parameter name → weight, of those in 4 or 8 bits."""
    for path, part in module.named_modules():
        for name, weight in vars(part).items():
            if isinstance(weight, QuantizedWeight):
                yield f"{path}.{name}", weight


def replace_weight(module: nn.Module, name: str, weight: QuantizedWeight | FP8Weight) -> None:
    """Replace a parameter. The checker still takes it for a Tensor, which it is in every model that is trained."""
    delattr(module, name)
    setattr(module, name, weight)


def shared_copies(model: Transformer) -> dict[str, Tensor]:
    """The multi-token modules' copies of embedding and head, of those that are here (a pipeline stage may have one)."""
    depth, mtp_depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    own, copies = dict(model.named_parameters()), dict[str, Tensor]()
    embedding, head = own.get(EMBEDDING), own.get(EMBEDDING if model.config.tie_word_embeddings else HEAD)
    for layer in range(depth, depth + mtp_depth):
        if embedding is not None:
            copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding.detach()
        if head is not None:
            copies[f"model.layers.{layer}.shared_head.head.weight"] = head.detach()
    return copies


def meta_model(config: ModelConfig, network: type[NetworkT] = Transformer) -> NetworkT:
    """The model on the meta device. Raises UserError for impossible sizes."""
    try:
        with torch.device("meta"):
            return network(config)
    except (RuntimeError, TypeError) as e:  # more numbers than 64 bits can count
        raise UserError(f"sizes in the configuration are too large ({str(e).splitlines()[0]}); correct them") from None


def allocate(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate uninitialised memory for a module on the meta device: parameters in `dtype`, buffers in their own."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(p, dtype=dtype, device=device)))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(b, device=device))
