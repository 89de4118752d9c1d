"""silu(gate) · up; compiled, one pass forward and one backward."""

import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float


def swiglu(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) · up (Shazeer 2020)."""
    return _SwiGLU.apply(gate, up) if cpu.usable(gate, up) and gate.shape == up.shape else swiglu_reference(gate, up)


def swiglu_joined(x: Float[Tensor, "*batch gate_up"]) -> Float[Tensor, "*batch F"]:
    """`swiglu` of x [..., 2F], gate then up, whose gradient is written as one tensor."""
    return _Joined.apply(x) if cpu.usable(x) else swiglu_reference(*x.chunk(2, dim=-1))


def swiglu_joined_gradient(
    grad: Float[Tensor, "*batch F"], x: Float[Tensor, "*batch gate_up"]
) -> Float[Tensor, "*batch gate_up"]:
    """The gradient of `swiglu_joined` with respect to x."""
    grad_x, (gate, up) = x.new_empty(x.shape), x.chunk(2, dim=-1)
    if cpu.usable(grad, x):
        _backward(grad, gate, up, *grad_x.chunk(2, dim=-1))
    else:
        _backward_reference(grad, gate, up, *grad_x.chunk(2, dim=-1))
    return grad_x


def swiglu_reference(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    return F.silu(gate) * up


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
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward(*x.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        return swiglu_joined_gradient(grad, *ctx.saved_tensors)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    (gate, a), (up, b) = cpu.rows(gate), cpu.rows(up)
    out = gate.new_empty(gate.shape)
    width = gate.shape[-1]
    cpu.call("swiglu", gate.dtype, gate, a, up, b, gate.numel() // width, width, out)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Writes grad_gate and grad_up, whose rows must have a constant stride."""
    (grad, g), (gate, a), (up, b) = cpu.rows(grad), cpu.rows(gate), cpu.rows(up)
    width, strides = gate.shape[-1], (cpu.rows(grad_gate)[1], cpu.rows(grad_up)[1])
    arguments = (grad, g, gate, a, up, b, grad.numel() // width, width, grad_gate, strides[0], grad_up, strides[1])
    cpu.call("swiglu_backward", gate.dtype, *arguments)


def _backward_reference(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    x, g = gate.float(), grad.float()
    s = x.sigmoid()
    grad_up.copy_(g * x * s)
    grad_gate.copy_(g * up.float() * s * (1 + x * (1 - s)))
