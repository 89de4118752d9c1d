"""The arithmetic of csrc/exact_math.h in PyTorch, bit for bit: elementwise operations, whose results IEEE 754 fixes.

A sum is one chain in ascending order, or 16 chains (element i belongs to chain i % 16) that are added by halving.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rorqual.kernels import cpu
from rorqual.shapes import Float32, Float64

CHAINS = 16
MAGIC = 12582912.0  # 1.5 · 2²³: adding and subtracting it rounds to an integer
LN_2 = 0.6931471805599453
COEFFICIENTS = (1.98412698e-4, 1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0)


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors, whose last dimension may be strided."""
    return cpu.capability() is not None and all(t.is_cpu and t.dtype is torch.float32 for t in tensors)


def fma(a: Float32[Tensor, "*#s"], b: Float32[Tensor, "*#s"], c: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
    """a·b + c, rounded once.

    The product of two floats is exact in double; their sum is rounded to odd, so that rounding it again to a float
    rounds the exact number (Boldo & Melquiond 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    odd = torch.where(away, bits + 1, bits - 1)
    inexact = (error.abs() > 0) & (bits & 1 == 0) & total.isfinite()
    return torch.where(inexact, odd, bits).view(torch.float64).float()


def chains_sum(chains: Float32[Tensor, "*s 16"]) -> Float32[Tensor, "*s"]:
    while chains.shape[-1] > 1:
        low, high = torch.chunk(chains, 2, dim=-1)
        chains = low + high
    return chains.squeeze(-1)


def total(x: Float32[Tensor, "*s n"]) -> Float32[Tensor, "*s"]:
    """The sum of the last dimension, of 16 chains."""
    chains = x.new_zeros(*x.shape[:-1], CHAINS)
    for part in _parts(x):
        chains = chains + part
    return chains_sum(chains)


def dot_chains(a: Float32[Tensor, "*#s n"], b: Float32[Tensor, "*#s n"], chains: Tensor) -> Float32[Tensor, "*s 16"]:
    """The 16 chains of a·b over the last dimension, continued from `chains`."""
    for x, y in zip(_parts(a), _parts(b), strict=True):
        chains = fma(x, y, chains)
    return chains


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """CHAINS columns at a time; zeros at the end change no sum."""
    return torch.split(pad(x, (0, -x.shape[-1] % CHAINS)), CHAINS, dim=-1)


def exp(x: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
    """eˣ within 2 ulp, 0 below -87, e⁸⁸ above 88."""

    def number(value: float) -> Tensor:
        return torch.full_like(x, value)

    y = x.clamp(-87.0, 88.0)
    n = fma(y, number(1.44269504), number(MAGIC)) - MAGIC
    r = fma(n, number(2.12194440e-4), fma(n, number(-0.693359375), y))
    p = number(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = fma(p, r, number(coefficient))
    scale = ((n.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, p * scale)


def log(x: Float64[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
    """ln x of normal numbers, by the series of artanh."""
    bits = x.view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    m = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    high = m > 1.4142135623730951
    m, exponent = torch.where(high, m * 0.5, m), torch.where(high, exponent + 1.0, exponent)
    s = (m - 1.0) / (m + 1.0)
    z, series = s * s, torch.zeros_like(s)
    for k in range(21, 0, -2):
        series = series * z + 1.0 / k
    return exponent * LN_2 + 2.0 * s * series
