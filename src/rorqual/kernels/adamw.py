"""One step of AdamW on one tensor whose moments are stored in BF16 or in 8 bits; weights and arithmetic are FP32.

BF16: V3 §3.3.2. 8 bits: block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861 §2). A code is the position
of its number in a table; the numbers are denser towards 0, and each block of 256 is scaled by its largest magnitude.
The second moments' table has no 0: a second moment rounded to 0 under a first moment that is not would divide it by
`eps` (the zero-point problem, 2309.01507 §4.1). A block of zeros has the scale 0, so it stays 0.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.shapes import BFloat16, Float32, UInt8

BLOCK = 256  # elements that share a scale
SMALL = 4096  # elements of a tensor below which 8-bit moments stay FP32: norms and biases, which are no memory
FIRST_BITS, SECOND_BITS = 7, 8  # of a magnitude's code; the first moment has a sign


@dataclass(frozen=True)
class Coefficients:
    """One step as its arithmetic has it, with g a gradient, m and v the moments and w a weight:

    m += new_first·(g − m);  v += new_second·(g² − v);  w ← keep·w − rate·m / (√v·root + eps).
    """

    new_first: float  # 1 − β₁
    new_second: float  # 1 − β₂
    keep: float  # 1 − lr · weight decay
    rate: float  # lr / (1 − β₁ᵗ)
    root: float  # 1 / √(1 − β₂ᵗ)
    eps: float

    @classmethod
    def of(cls, lr: float, betas: tuple[float, float], weight_decay: float, eps: float, steps: int) -> "Coefficients":
        """Of the `steps`-th step of a tensor, from 1 on."""
        first, second = betas
        return cls(
            1 - first, 1 - second, 1 - lr * weight_decay, lr / (1 - first**steps), 1 / math.sqrt(1 - second**steps), eps
        )

    def numbers(self) -> tuple[float, ...]:
        """In the order in which the compiled functions take them."""
        return self.new_first, self.new_second, self.keep, self.rate, self.root, self.eps


def moment_dtype(moments: str, elements: int) -> torch.dtype:
    """How AdamW stores the moments of a tensor of so many elements, given the recipe's `optimizer.moments`."""
    if moments == "8bit" and elements >= SMALL:
        return torch.uint8
    return torch.bfloat16 if moments == "bfloat16" else torch.float32


def scales(elements: int) -> int:
    """Scales of an 8-bit moment of so many elements."""
    return -(-elements // BLOCK)


# -- BF16


def adamw_bfloat16(
    weight: Float32[Tensor, "*S"],
    grad: Float32[Tensor, "*S"],
    first: BFloat16[Tensor, "*S"],
    second: BFloat16[Tensor, "*S"],
    step: Coefficients,
    key: int | None = None,
) -> None:
    """Update weight and moments in place; tensors are contiguous.

    key: of the step's random numbers, 32 bits: moments are rounded up or down with probabilities by their distances, so
    that their mean is right; None: to nearest.
    """
    if cpu.usable(first, second) and all(t.is_cpu and t.is_contiguous() for t in (weight, grad, first, second)):
        rounding = -1 if key is None else key
        cpu.call("adamw", first.dtype, weight, grad, first, second, weight.numel(), rounding, *step.numbers())
    else:
        adamw_bfloat16_reference(weight, grad, first, second, step, key)


def adamw_bfloat16_reference(
    weight: Float32[Tensor, "*S"],
    grad: Float32[Tensor, "*S"],
    first: BFloat16[Tensor, "*S"],
    second: BFloat16[Tensor, "*S"],
    step: Coefficients,
    key: int | None = None,
) -> None:
    m, v = first.float(), second.float()
    _update(weight, grad, m, v, step)
    if key is None:
        first.copy_(m)
        second.copy_(v)
    else:
        random = _random_bits(weight.numel(), key, weight.device).view(weight.shape)
        first.copy_(_round_by_chance(m, random & 0xFFFF))
        second.copy_(_round_by_chance(v, random >> 16))


def _random_bits(count: int, key: int, device: torch.device) -> Tensor:
    """32 bits an element, from its position and the key alone, so that a resumed run draws the same (MurmurHash3)."""
    x = (torch.arange(count, device=device) * 0x9E3779B9 & 0xFFFFFFFF) ^ key
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _round_by_chance(x: Float32[Tensor, "*S"], random: Tensor) -> Float32[Tensor, "*S"]:
    """x as a BF16 number in FP32: `random` (16 bits) decides whether the 16 bits that are cut off carry."""
    return ((x.view(torch.int32) + random.int()) & ~0xFFFF).view(torch.float32)


# -- 8 bits


def adamw_8bit(
    weight: Float32[Tensor, "*S"],
    grad: Float32[Tensor, "*S"],
    first: UInt8[Tensor, "*S"],
    second: UInt8[Tensor, "*S"],
    first_scale: Float32[Tensor, " N"],
    second_scale: Float32[Tensor, " N"],
    step: Coefficients,
) -> None:
    """Update weight, moments and the moments' scales in place; tensors are contiguous."""
    tensors = (weight, grad, first, second, first_scale, second_scale)
    if cpu.usable(weight, grad) and all(t.is_cpu and t.is_contiguous() for t in tensors):
        tables = first_table(weight.device), second_table(weight.device)
        cpu.call("adamw_8bit", weight.dtype, *tensors, *tables, weight.numel(), *step.numbers())
    else:
        adamw_8bit_reference(*tensors, step)


def adamw_8bit_reference(
    weight: Float32[Tensor, "*S"],
    grad: Float32[Tensor, "*S"],
    first: UInt8[Tensor, "*S"],
    second: UInt8[Tensor, "*S"],
    first_scale: Float32[Tensor, " N"],
    second_scale: Float32[Tensor, " N"],
    step: Coefficients,
) -> None:
    tables = first_table(weight.device), second_table(weight.device)
    m, v = dequantize(first, first_scale, tables[0]), dequantize(second, second_scale, tables[1])
    _update(weight, grad, m, v, step)
    for x, codes, scale, signed in ((m, first, first_scale, True), (v, second, second_scale, False)):
        new_codes, new_scale = quantize(x, signed)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def quantize(x: Float32[Tensor, "*S"], signed: bool) -> tuple[UInt8[Tensor, "*S"], Float32[Tensor, " N"]]:
    """Codes, and the largest magnitude of every block of 256 elements; the last block may be shorter."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    share = blocks / scale.masked_fill(scale == 0, 1)[:, None]
    if signed:
        # 127 is 0; above it are the positive codes, below it the negative ones, of which the largest has no 1.
        edges = _edges(FIRST_BITS).to(x.device)
        magnitude = torch.bucketize(share.abs(), torch.cat([edges[:1] * 2.75, edges[1:]]), right=True)
        codes = 127 + torch.where(share < 0, -magnitude.clamp(max=127), magnitude)
    else:
        codes = torch.bucketize(share, _edges(SECOND_BITS).to(x.device)[1:], right=True)
    return codes.flatten()[: x.numel()].view(x.shape).to(torch.uint8), scale


def dequantize(
    codes: UInt8[Tensor, "*S"], scale: Float32[Tensor, " N"], table: Float32[Tensor, "256"]
) -> Float32[Tensor, "*S"]:
    each = scale.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return table[codes.int()] * each


@functools.cache
def first_table(device: torch.device) -> Float32[Tensor, "256"]:
    """Numbers of the codes of first moments, in [-1, 1], ascending."""
    positive = _magnitudes(FIRST_BITS)
    return torch.cat([-positive[:-1].flip(0), torch.zeros(1), positive]).to(device)


@functools.cache
def second_table(device: torch.device) -> Float32[Tensor, "256"]:
    """Numbers of the codes of second moments, in (0, 1], ascending."""
    return _magnitudes(SECOND_BITS).to(device)


def _magnitudes(bits: int) -> Float32[Tensor, " M"]:
    """The middles of the cells that `_edges` begins, and 1: M = 2^bits."""
    edges = _edges(bits)
    return torch.cat([(edges[:-1] + edges[1:]) / 2, edges[-1:]])


def _edges(bits: int) -> Float32[Tensor, " M"]:
    """Where the cell of each magnitude begins: `bits` decades below 1, the k-th from below cut into 2^k equal cells."""
    decades = [10.0 ** (k - bits) * (1 + 9 * i / 2**k) for k in range(bits) for i in range(2**k)]
    return torch.tensor([*decades, 1.0], dtype=torch.float32)


def _update(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Coefficients) -> None:
    m.add_(grad - m, alpha=step.new_first)
    v.add_(grad * grad - v, alpha=step.new_second)
    weight.mul_(step.keep).addcdiv_(m, v.sqrt().mul_(step.root).add_(step.eps), value=-step.rate)
