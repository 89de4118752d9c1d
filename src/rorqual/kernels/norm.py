"""RMS normalisation; compiled, forward and backward make one pass over x each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels import cpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension [..., D], computed in FP32, returned in x's dtype."""
    if not torch.is_grad_enabled():
        weight = weight.float()  # of a BF16 model; a copy of one row
    if cpu.usable(x) and weight.dtype == torch.float32 and weight.shape == x.shape[-1:]:
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        (x, stride), (grad, grad_stride) = cpu.rows(x), cpu.rows(grad)
        grad_x, width, threads = x.new_empty(x.shape), x.shape[-1], torch.get_num_threads()
        parts = x.new_zeros(threads, width, dtype=torch.float32)
        tensors = (grad, grad_stride, x, stride, weight, rstd)
        cpu.call("rms_norm_backward", x.dtype, *tensors, len(rstd), width, grad_x, parts, threads)
        return grad_x, parts.sum(0), None
