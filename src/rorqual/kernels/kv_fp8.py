"""The FP8 KV cache: rows of E4M3 values with an FP32 scale for every 128 (cpu/csrc/kv_fp8.h).

A row is a key or value of one head and token, or an MLA latent. It is FlashMLA's FP8 cache of DeepSeek-V3.2-Exp: a
scale is the largest magnitude of its values / 448, E4M3's largest number. E4M3 keeps three bits over a range of 2^15
below that, so finer scales gain little.

B blocks of P slots, G key/value heads of width W; `row`: W rounded up to a multiple of 4, and 4·⌈W/128⌉ bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.shapes import Float, Float32, Int64, UInt8

TILE = 128  # values that share a scale
LARGEST = 448.0  # E4M3's
LEAST = 2.0**-100  # of what a scale is made: so it has all its bits


def row_bytes(width: int) -> int:
    return _scales_offset(width) + 4 * -(-width // TILE)


def store_fp8(store: UInt8[Tensor, "B P G row"], slots: Int64[Tensor, " N"], x: Float[Tensor, "N G W"]) -> None:
    """Quantise x into `slots` of the store; slot s is in block s // P."""
    if not cpu.usable(x) or not store.is_cpu:
        return store_fp8_reference(store, slots, x)
    N, G, W = x.shape
    cpu.call("store_fp8", x.dtype, x.contiguous(), N, G, W, slots.contiguous(), store)


def store_fp8_reference(
    store: UInt8[Tensor, "B P G row"], slots: Int64[Tensor, " N"], x: Float[Tensor, "N G W"]
) -> None:
    store.flatten(0, 1)[slots] = quantize(x)


def quantize(x: Float[Tensor, "*n W"]) -> UInt8[Tensor, "*n row"]:
    """Rows of the cache. A tile with a NaN or an infinity becomes NaN."""
    W = x.shape[-1]
    tiles = torch.unflatten(F.pad(x.float(), (0, -W % TILE)), -1, (-1, TILE))
    largest = tiles.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    # A product, since a quotient by a number is one on a GPU only.
    scales = torch.where(finite, largest.clamp(min=LEAST) * (1 / LARGEST), torch.nan)
    scaled = torch.where(finite, tiles / scales, torch.nan).clamp(-LARGEST, LARGEST).flatten(-2)[..., :W]
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([F.pad(codes, (0, -W % 4)), scales.squeeze(-1).contiguous().view(torch.uint8)], dim=-1)


def dequantize(rows: UInt8[Tensor, "*n row"], width: int) -> Float32[Tensor, "*n width"]:
    codes, scales = rows[..., :width].contiguous(), rows[..., _scales_offset(width) :].contiguous()
    by_value = scales.view(torch.float32).repeat_interleave(TILE, -1)[..., :width]
    return codes.view(torch.float8_e4m3fn).float() * by_value


def _scales_offset(width: int) -> int:
    return -(-width // 4) * 4
