"""Tensor names of releases, and the model's tensors by these names.

In memory the routed experts of a layer are stacked, and multi-token modules share embedding and head with the main
model; on disk every expert has its own tensors and every module its copies.
"""

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

EMBEDDING = "model.embed_tokens.weight"


def release_tensors(model: Transformer) -> dict[str, Tensor]:
    """Release name → tensor; experts are views of their stack, shared tensors appear twice."""
    return own_tensors(model) | shared_copies(model)


def own_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
        tensor = tensor.detach()
        layer, _, stack = name.rpartition(".experts.")
        if stack == "gate_up_proj":
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                out[f"{layer}.experts.{e}.gate_proj.weight"] = gate
                out[f"{layer}.experts.{e}.up_proj.weight"] = up
        elif stack == "down_proj":
            out |= {f"{layer}.experts.{e}.down_proj.weight": expert for e, expert in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def shared_copies(model: Transformer) -> dict[str, Tensor]:
    depth, mtp_depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    embedding, head = model.model.embed_tokens.weight.detach(), model.head_weight.detach()
    copies: dict[str, Tensor] = {}
    for layer in range(depth, depth + mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def meta_model(config: ModelConfig) -> Transformer:
    """The model on the meta device. Raises UserError for impossible sizes."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError) as e:  # more numbers than 64 bits can count
        raise UserError(f"sizes in the configuration are too large ({str(e).splitlines()[0]}); correct them") from None


def allocate(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate uninitialised memory for a module on the meta device: parameters in `dtype`, buffers in their own."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(p, dtype=dtype, device=device)))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(b, device=device))
