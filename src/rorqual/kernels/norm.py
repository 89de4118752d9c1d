"""RMS normalisation; compiled, forward and backward make one pass over x each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Float


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*batch D"]:
    """x / √(mean(x²) + eps) · weight over the last dimension, computed in FP32, returned in x's dtype."""
    if not torch.is_grad_enabled():
        weight = weight.float()  # of a BF16 model; a copy of one row
    if cpu.usable(x) and weight.dtype == torch.float32 and weight.shape == x.shape[-1:]:
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, stride = cpu.rows(x)
        out = x.new_empty(x.shape)
        width = x.shape[-1]
        count = x.numel() // width
        rstd = x.new_empty(count, dtype=torch.float32)
        cpu.call("rms_norm", x.dtype, x, stride, weight, count, width, eps, out, rstd)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        (x, stride), (grad, grad_stride) = cpu.rows(x), cpu.rows(grad)
        grad_x, width, threads = x.new_empty(x.shape), x.shape[-1], torch.get_num_threads()
        parts = x.new_zeros(threads, width, dtype=torch.float32)
        tensors = (grad, grad_stride, x, stride, weight, rstd)
        cpu.call("rms_norm_backward", x.dtype, *tensors, len(rstd), width, grad_x, parts, threads)
        return grad_x, parts.sum(0), None
