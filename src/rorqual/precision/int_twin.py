"""A copy of a model that is trained, with weights of 4 or 8 bits: what rollouts are sampled from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rorqual.adapters.lora import LoRALinear
from rorqual.checkpoint.release_tensors import meta_model, replace_weight
from rorqual.kernels.quantized_linear import packed_bytes
from rorqual.model import ModelConfig, Transformer
from rorqual.model.moe import Experts
from rorqual.precision.quantize import Bits, packable, quantized, replace_embedding

EMBEDDING = "model.embed_tokens"


class IntTwin:
    """`model` has weights that are rounded as `quantize.convert` does, but not smoothed; LoRA's updates are added
    before. Other parameters are copies in `dtype`, that of the original's products, routers and buffers copies as they
    are. It has no multi-token modules.

    The original is on a CPU.
    """

    def __init__(self, original: Transformer, bits: Bits, dtype: torch.dtype) -> None:
        self._original, self._dtype = original, dtype
        self._bits: Bits = bits
        self.model = _outline(original.config)
        self.model.released = original.released
        names = packed_names(self.model)
        packed = {name: quantized(self._value(name), bits) for name in names}
        for name, weight in packed.items():
            path, _, own = name.rpartition(".")
            if path == EMBEDDING:
                replace_embedding(self.model, weight)
            else:
                replace_weight(self.model.get_submodule(path), own, weight)
        self._packed = {name: weight for name, weight in packed.items() if self._is_trained(name)}
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
        """Round and copy the original's tensors as they are now, in place: an engine has their addresses."""
        for name, packed in self._packed.items():
            new = quantized(self._value(name), self._bits)
            packed.data.copy_(new.data)
            if packed.channels is not None and new.channels is not None:
                packed.channels.copy_(new.channels)
        for name, tensor in self._copied.items():
            tensor.copy_(self._value(name))

    def _value(self, name: str) -> Tensor:
        """A tensor of the original, as the twin has it before rounding."""
        path, _, own = name.rpartition(".")
        module = self._original.get_submodule(path)
        value: Tensor = getattr(module, own)
        dtype = _dtype(name, value, self._dtype)
        if isinstance(module, LoRALinear) and own == "weight":
            value = module.update.added_to(value)
        return value.detach().to(dtype)

    def _is_trained(self, name: str) -> bool:
        path, _, own = name.rpartition(".")
        module = self._original.get_submodule(path)
        return isinstance(module, LoRALinear) or getattr(module, own).requires_grad


def packed_names(model: Transformer) -> list[str]:
    """The parameters that the twin of `model` has in 4 or 8 bits."""
    return list(_packed_names(model))


def twin_bytes(config: ModelConfig, bits: Bits, dtype: torch.dtype) -> int:
    """What the twin of a model of these sizes takes."""
    model = _outline(config)
    names = set(packed_names(model))
    packed = sum(packed_bytes(bits, model.get_parameter(name).shape) for name in names)
    others = [*((n, p) for n, p in model.named_parameters() if n not in names), *model.named_buffers()]
    return packed + sum(t.numel() * _dtype(name, t, dtype).itemsize for name, t in others)


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    is_kept = not isinstance(tensor, nn.Parameter) or name.endswith("mlp.gate.weight")
    return tensor.dtype if is_kept else dtype


def _outline(config: ModelConfig) -> Transformer:
    return meta_model(config.replace(num_nextn_predict_layers=0))


def _packed_names(model: Transformer) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{path}.gate_up_proj", f"{path}.down_proj")
        elif packable(module) or path == EMBEDDING:
            yield f"{path}.weight"
