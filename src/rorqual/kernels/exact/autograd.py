"""Exact forward, ordinary backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from rorqual.kernels.typed_torch import Context, Function, once_differentiable

Formula = Callable[..., Tensor]


def exact(forward: Formula, ordinary: Formula, *inputs: Tensor) -> Tensor:
    """forward(*inputs), with the gradients of ordinary(*inputs), which computes the same up to rounding and runs in the
    backward pass.
    """
    return _Exact.apply(forward, ordinary, *inputs) if torch.is_grad_enabled() else forward(*inputs)


class _ExactContext(Context):
    ordinary: Formula


class _Exact(Function):
    @staticmethod
    def forward(ctx: _ExactContext, forward: Formula, ordinary: Formula, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.ordinary = ordinary
        return forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ExactContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            out = ctx.ordinary(*inputs)
        found = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad))
        return None, None, *(next(found) if need else None for need in needed)
