"""A copy of a model that is trained, with weights of 4 or 8 bits: what rollouts are sampled from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rorqual.adapters.lora import LoRALinear
from rorqual.checkpoint.release_tensors import meta_model, replace_weight
from rorqual.errors import UserError
from rorqual.kernels.quantized_linear import packed_bytes
from rorqual.model import ModelConfig, Transformer
from rorqual.model.moe import Experts
from rorqual.precision.quantize import Bits, packable, quantized, replace_embedding

EMBEDDING = "model.embed_tokens"


class IntTwin:
    """`model` has weights that are rounded as `quantize.convert` does, but not smoothed; LoRA's updates are added
    before. All other tensors are copies in the dtype that the original computes in. It has no multi-token modules.

    Raises UserError for a model that is not on a CPU.
    """

    def __init__(self, original: Transformer, bits: Bits, dtype: torch.dtype) -> None:
        if original.head_weight.device.type != "cpu":
            raise UserError(f"grpo.rollout_weights = {bits!r}: packed weights are for a CPU; take fp8, or leave it out")
        self._original, self._dtype = original, dtype
        self._bits: Bits = bits
        self.model = _outline(original.config)
        self.model.released = original.released
        self._packed = {name: quantized(self._value(name), bits) for name in packed_names(self.model)}
        for name, packed in self._packed.items():
            path, _, own = name.rpartition(".")
            if path == EMBEDDING:
                replace_embedding(self.model, packed)
            else:
                replace_weight(self.model.get_submodule(path), own, packed)
        self._copied: dict[str, Tensor] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            path, _, own = name.rpartition(".")
            copied = self._value(name).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(self.model.get_submodule(path), own, nn.Parameter(copied) if is_parameter else copied)
            self._copied[name] = copied
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round and copy the original's tensors as they are now, in place."""
        for name, packed in self._packed.items():
            new = quantized(self._value(name), self._bits)
            packed.data.copy_(new.data)
            if packed.channels is not None and new.channels is not None:
                packed.channels.copy_(new.channels)
        for name, tensor in self._copied.items():
            tensor.copy_(self._value(name))

    def _value(self, name: str) -> Tensor:
        """A tensor of the original; routers stay in FP32."""
        path, _, own = name.rpartition(".")
        module = self._original.get_submodule(path)
        value: Tensor = getattr(module, own).detach()
        if isinstance(module, LoRALinear) and own == "weight":
            value = module.update.added_to(value).detach()
        return value if name.endswith("mlp.gate.weight") or not value.is_floating_point() else value.to(self._dtype)


def packed_names(model: Transformer) -> list[str]:
    """The parameters that the twin of `model` has in 4 or 8 bits."""
    return list(_packed_names(model))


def twin_bytes(config: ModelConfig, bits: Bits) -> int:
    """What the packed weights of a model of these sizes take."""
    model = _outline(config)
    return sum(packed_bytes(bits, model.get_parameter(name).shape) for name in packed_names(model))


def _outline(config: ModelConfig) -> Transformer:
    return meta_model(config.replace(num_nextn_predict_layers=0))


def _packed_names(model: Transformer) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{path}.gate_up_proj", f"{path}.down_proj")
        elif packable(module) or path == EMBEDDING:
            yield f"{path}.weight"
