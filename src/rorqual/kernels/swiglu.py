"""silu(gate) · up; compiled, one pass forward and one backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float, Float32


def swiglu(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) · up (Shazeer 2020)."""
    return _SwiGLU.apply(gate, up) if cpu.usable(gate, up) and gate.shape == up.shape else swiglu_reference(gate, up)


def swiglu_joined(x: Float[Tensor, "M gate_up"], weights: Float[Tensor, " M"] | None = None) -> Float[Tensor, "M F"]:
    """`swiglu` of x [M, 2F], gate then up, each row times its weight in FP32, if there is one.

    The gradient is written as one tensor. The product without weights is not kept, but computed again for theirs.
    """
    if x.dtype is torch.float64:
        return swiglu_joined_reference(x, weights)
    return _Joined.apply(x, weights)


def swiglu_joined_gradient(
    grad: Float[Tensor, "M F"], x: Float[Tensor, "M gate_up"], weights: Float32[Tensor, " M"] | None = None
) -> tuple[Float[Tensor, "M gate_up"], Float32[Tensor, " M"] | None]:
    """The gradients of `swiglu_joined` with respect to x and weights."""
    grad_x, (gate, up) = x.new_empty(x.shape), x.chunk(2, dim=-1)
    grad_gate, grad_up = grad_x.chunk(2, dim=-1)
    grad_weights = None if weights is None else torch.empty_like(weights)
    if cpu.usable(grad, x):
        _backward(grad, gate, up, grad_gate, grad_up, weights, grad_weights)
    else:
        _backward_reference(grad, gate, up, grad_gate, grad_up, weights, grad_weights)
    return grad_x, grad_weights


def swiglu_reference(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    return F.silu(gate) * up


def swiglu_joined_reference(
    x: Float[Tensor, "M gate_up"], weights: Float[Tensor, " M"] | None = None
) -> Float[Tensor, "M F"]:
    out = swiglu_reference(*x.chunk(2, dim=-1))
    return out if weights is None else out * weights.to(x.dtype).unsqueeze(1)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = gate.new_empty(gate.shape), up.new_empty(up.shape)
        _backward(grad, gate, up, *grads)
        return grads


class _Joined(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weights)  # pyright: ignore[reportArgumentType]
        if not cpu.usable(x):
            return swiglu_joined_reference(x, weights)
        gate, up = x.chunk(2, dim=-1)
        return _forward(gate, up, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weights = ctx.saved_tensors
        return swiglu_joined_gradient(grad, x, weights)


def _forward(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    (gate, a), (up, b) = cpu.rows(gate), cpu.rows(up)
    out = gate.new_empty(gate.shape)
    width = gate.shape[-1]
    weights = None if weights is None else weights.contiguous()
    cpu.call("swiglu", gate.dtype, gate, a, up, b, weights, gate.numel() // width, width, out)
    return out


def _backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, weights: Tensor | None = None,
    grad_weights: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes grad_gate and grad_up, whose rows must have a constant stride."""
    (grad, g), (gate, a), (up, b) = cpu.rows(grad), cpu.rows(gate), cpu.rows(up)
    width, strides = gate.shape[-1], (cpu.rows(grad_gate)[1], cpu.rows(grad_up)[1])
    weights = None if weights is None else weights.contiguous()
    sizes, grads = (grad.numel() // width, width), (grad_gate, strides[0], grad_up, strides[1], grad_weights)
    cpu.call("swiglu_backward", gate.dtype, grad, g, gate, a, up, b, weights, *sizes, *grads)


def _backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, weights: Tensor | None,
    grad_weights: Tensor | None,
) -> None:  # fmt: skip
    x, g = gate.float(), grad.float()
    s = x.sigmoid()
    if weights is not None and grad_weights is not None:
        torch.sum(g * x * s * up.float(), -1, out=grad_weights)
        g = g * weights.unsqueeze(1)
    grad_up.copy_(g * x * s)
    grad_gate.copy_(g * up.float() * s * (1 + x * (1 - s)))
