"""Functions of rows: norm, rotation, SwiGLU, the router's scores, and log-probabilities of tokens."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.exact.arithmetic import chains_sum, dot_chains, exp, log, total, usable
from rorqual.kernels.exact.autograd import exact
from rorqual.kernels.norm import rms_norm
from rorqual.kernels.rotary import Table, apply_rotary, apply_rotary_reference
from rorqual.kernels.swiglu import swiglu, swiglu_joined
from rorqual.shapes import Float32, Float64, Int, Int64

VOCABULARY_BLOCK = 256  # tokens whose sum is a float; as in csrc/exact_rows.cpp
HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)  # 33 bits each; their sum is π/2


def exact_rms_norm(x: Float32[Tensor, "*batch D"], weight: Float32[Tensor, " D"], eps: float) -> Tensor:
    return exact(partial(_rms_norm, eps=eps), partial(rms_norm, eps=eps), x, weight)


def exact_swiglu(gate: Float32[Tensor, "*batch F"], up: Float32[Tensor, "*batch F"]) -> Float32[Tensor, "*batch F"]:
    return exact(_swiglu, swiglu, gate, up)


def exact_swiglu_joined(x: Float32[Tensor, "M gate_up"], weights: Float32[Tensor, " M"]) -> Float32[Tensor, "M F"]:
    """See `swiglu_joined`."""
    return exact(_swiglu_joined, swiglu_joined, x, weights)


def exact_sigmoid(x: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
    return exact(_sigmoid, torch.sigmoid, x)


def exact_softmax(x: Float32[Tensor, "*batch E"]) -> Float32[Tensor, "*batch E"]:
    return exact(_softmax, partial(torch.softmax, dim=-1), x)


def exact_rotary(x: Float32[Tensor, "B T H R"], table: Table, interleave: bool) -> Float32[Tensor, "B T H R"]:
    """See `apply_rotary`."""
    fixed: dict[str, Any] = {"table": table, "interleave": interleave}
    return exact(partial(_rotary, **fixed), partial(apply_rotary, **fixed), x)


@torch.no_grad()
def exact_logprobs(
    logits: Float32[Tensor, "n V"], targets: Int[Tensor, " n"], temperatures: Float32[Tensor, " n"]
) -> Float32[Tensor, " n"]:
    """log softmax(logits/temperature) of the targets, without a gradient; at temperature 0 as at 1.

    Raises IndexError for a target beyond V.
    """
    targets, logits = targets.long().contiguous(), logits.contiguous()
    if len(targets) and not (targets.min() >= 0 and targets.max() < logits.shape[1]):
        raise IndexError(f"a target is outside the vocabulary of {logits.shape[1]} tokens")
    if not usable(logits):
        return logprobs_reference(logits, targets, temperatures)
    out = logits.new_empty(len(logits))
    cpu.call("exact_logprobs", logits.dtype, logits, *logits.shape, targets, temperatures.contiguous(), out)
    return out


def exact_rotary_table(angles: Float32[Tensor, "*s"], factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin times `factor`. Below 2²⁰ radians they are correct to a float's rounding."""
    x = angles.double()
    quarter = (x / HALF_PI[0]).round()
    r = x
    for part in HALF_PI:  # quarter · part is exact, or far below a float's rounding
        r = r - quarter * part
    z = r * r
    sine, cosine = r * _series(z, 1), _series(z, 0)
    turn = quarter.long() & 3
    swapped, cos_negative, sin_negative = turn & 1 == 1, (turn == 1) | (turn == 2), turn >= 2
    cos, sin = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    cos, sin = torch.where(cos_negative, -cos, cos), torch.where(sin_negative, -sin, sin)
    return cos.float() * factor, sin.float() * factor


def _series(z: Float64[Tensor, "*s"], first: int) -> Float64[Tensor, "*s"]:
    """Of cos r (`first` 0) or sin r / r (1) over z = r², |r| ≤ π/4."""
    found = torch.ones_like(z)
    for n in range(16 + first, first, -2):
        found = 1.0 - found * z * (1.0 / (n * (n - 1)))
    return found


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = chains_sum(dot_chains(x, x, x.new_zeros(*x.shape[:-1], 16))) / x.shape[-1]
    root = (mean + eps).double().sqrt().float()  # of floats PyTorch may round it otherwise
    return x * (1.0 / root).unsqueeze(-1) * weight


def swiglu_reference(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    out = gate / (1.0 + exp(-gate)) * up
    return out if weights is None else out * weights.unsqueeze(1)


def softmax_reference(x: Tensor) -> Tensor:
    weights = exp(x - x.amax(-1, keepdim=True))
    return weights / total(weights).unsqueeze(-1)


def logprobs_reference(logits: Tensor, targets: Int64[Tensor, " n"], temperatures: Tensor) -> Tensor:
    inverse = torch.where(temperatures == 0, 1.0, 1.0 / temperatures).clamp(max=torch.finfo(torch.float32).max)
    scaled = (logits - logits.amax(-1, keepdim=True)) * inverse.unsqueeze(1)
    summed = torch.zeros(len(logits), dtype=torch.float64)
    for part in torch.split(exp(scaled), VOCABULARY_BLOCK, dim=-1):
        summed = summed + total(part).double()
    return scaled.gather(1, targets[:, None])[:, 0] - log(summed).float()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not usable(x, weight):
        return rms_norm_reference(x, weight, eps)
    x, stride = cpu.rows(x)
    width, out = x.shape[-1], x.new_empty(x.shape)
    count = x.numel() // width
    cpu.call("exact_rms_norm", x.dtype, x, stride, weight, count, width, eps, out, x.new_empty(count))
    return out


def _swiglu(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    if not usable(gate, up):
        return swiglu_reference(gate, up, weights)
    (gate, a), (up, b) = cpu.rows(gate), cpu.rows(up)
    width, out = gate.shape[-1], gate.new_empty(gate.shape)
    weights = None if weights is None else weights.contiguous()
    cpu.call("exact_swiglu", gate.dtype, gate, a, up, b, weights, gate.numel() // width, width, out)
    return out


def _swiglu_joined(x: Tensor, weights: Tensor) -> Tensor:
    gate, up = torch.chunk(x, 2, dim=-1)
    return _swiglu(gate, up, weights)


def _sigmoid(x: Tensor) -> Tensor:
    if not usable(x):
        return 1.0 / (1.0 + exp(-x))
    x = x.contiguous()
    out = torch.empty_like(x)
    cpu.call("exact_sigmoid", x.dtype, x, x.numel(), out)
    return out


def _softmax(x: Tensor) -> Tensor:
    if not usable(x):
        return softmax_reference(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    cpu.call("exact_softmax", x.dtype, x, x.numel() // x.shape[-1], x.shape[-1], out)
    return out


def _rotary(x: Tensor, table: Table, interleave: bool) -> Tensor:
    cos, sin = table
    B, T, H, R = x.shape
    if not usable(x, cos, sin):
        return apply_rotary_reference(x, table, interleave)
    if x.stride(3) != 1 or x.stride(0) != x.stride(1) * T:
        x = x.contiguous()
    out = x.new_empty(B, T, H, R)
    pairs = (2, 1) if interleave else (1, R // 2)
    cpu.call(
        "exact_rotary", x.dtype, x, x.stride(1), x.stride(2), *pairs, cos.contiguous(), sin.contiguous(),
        cos.shape[0] * T, B * T, H, R // 2, out,
    )  # fmt: skip
    return out
