"""Root-mean-square normalisation; compiled, both directions make one pass over x each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension [..., D], computed in FP32, returned in x's dtype."""
    if weight.dtype == torch.float32 and cpu.usable(x):
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, stride = cpu.rows(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        width = x.shape[-1]
        count = x.numel() // width
        rstd = torch.empty(count)
        cpu.call("rms_norm", x.dtype, x, stride, weight, count, width, eps, out, rstd)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        (x, stride), (grad, grad_stride) = cpu.rows(x), cpu.rows(grad)
        grad_x, width = torch.empty(x.shape, dtype=x.dtype), x.shape[-1]
        parts = torch.zeros(torch.get_num_threads(), width)
        cpu.call(
            "rms_norm_backward", x.dtype, grad, grad_stride, x, stride, weight, rstd, len(rstd), width, grad_x, parts
        )
        return grad_x, parts.sum(0), None
