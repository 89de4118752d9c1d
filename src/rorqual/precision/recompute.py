"""Compute activations again in the backward pass instead of keeping them (V3 §3.2.3), or keep them on the CPU.

| | what is computed again |
|---|---|
| none | nothing |
| v3 | outputs of norms, and latent attention from its latents on: up-projections, rotation; not attention itself |
| full | every layer, from its input |

Gradients are the same bits. FP8 feed-forwards compute SwiGLU again in every case (kernels/scaled_linear.py).
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rorqual.model import Transformer
from rorqual.model.attention import MultiHeadLatentAttention
from rorqual.model.layers import RMSNorm
from rorqual.model.moe import Routing
from rorqual.model.transformer import Block

Recompute = Literal["none", "v3", "full"]
ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)


class Activations:
    """What the forward pass of `model` keeps for the backward pass. Run forward passes in `kept()`.

    offload: activations of a GPU go to pinned memory of the CPU, and come back when they are needed.
    """

    def __init__(self, model: Transformer, recompute: Recompute = "none", offload: bool = False) -> None:
        self.offload, self.norms = offload, recompute == "v3"
        self._outputs: dict[int, _NormOutput] = {}  # by address
        for module in model.modules():
            if recompute == "full" and isinstance(module, Block):
                vars(module)["run"] = functools.partial(_run_again, module.run)
            elif recompute == "v3" and isinstance(module, MultiHeadLatentAttention):
                vars(module)["heads"] = functools.partial(_heads_again, module.heads)
            elif recompute == "v3" and isinstance(module, RMSNorm):
                module.register_forward_hook(self._note)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context of a forward pass."""
        if not (self.norms or self.offload):
            yield
            return
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._outputs.clear()

    def _note(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            found = _NormOutput(weakref.ref(output), norm, inputs[0].detach())
            self._outputs[output.untyped_storage().data_ptr()] = found

    def _pack(self, tensor: Tensor) -> Any:
        found = self._outputs.get(tensor.untyped_storage().data_ptr())
        # While the output lives, nothing else has its address.
        if found is not None and (output := found.output()) is not None and output.numel() == tensor.numel():
            return functools.partial(_norm_again, found.norm, found.input, tensor.shape)
        if self.offload and not tensor.is_cpu and not isinstance(tensor, nn.Parameter):
            return functools.partial(_back, _to_cpu(tensor), tensor.device)
        return tensor


@dataclass(frozen=True)
class _NormOutput:
    output: "weakref.ref[Tensor]"
    norm: nn.Module
    input: Tensor


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _norm_again(norm: nn.Module, x: Tensor, shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return norm.forward(x).view(shape)


def _to_cpu(tensor: Tensor) -> Tensor:
    to = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return to.copy_(tensor, non_blocking=True)


def _back(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _run_again(run: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """A layer whose forward pass runs again; its router's statistics count once."""
    *others, cache, routing = inputs
    if cache is not None or not torch.is_grad_enabled():
        return run(*inputs)

    def layer(*others: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        found: list[Routing] = []
        out = run(*others, cache, found if routing is not None else None)
        return out, [(r.load, r.sequence_loss) for r in found]

    out, found = checkpoint(layer, *others, use_reentrant=False, preserve_rng_state=False)
    if routing is not None:
        routing.extend(Routing(load, loss) for load, loss in found)
    return out


def _heads_again(heads: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Attention from its latents, whose output is kept: all but attention itself runs again."""
    if inputs[-1] is not None or not torch.is_grad_enabled():  # with a KV cache
        return heads(*inputs)
    context = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(heads, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context)


def _policy(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
