"""Matrix products with int4 or int8 weights, by int8 activations, without dequantising.

`quantized_linear` is the product: cpu/csrc/qgemm.cpp, whose loop over rows and panels is in quantized_weight.h, with
microkernel.h. On AMX `int8` weights take amx.h, by int16 activations. A fused decode step (fused_decode.py) calls the
same loop from C++.
M rows, K in, N out, E experts, G = ⌈K/32⌉ groups of inputs. Memory layout: cpu/csrc/quantized_weight.h.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.shapes import Float, Float32, Int, Int32, UInt8

Format = Literal["int4", "int4_mins", "int8", "int8_groups"]
FORMATS: tuple[Format, ...] = ("int4", "int4_mins", "int8", "int8_groups")  # numbered as in cpu/csrc/quantized_rows.h
GROUP, PANEL = 32, 16
ACTIVATION_GROUPS = 3  # groups of activations that share a scale, with int8 weights (cpu/csrc/quantized_rows.h)


@dataclass
class QuantizedWeight:
    """Weights [E, N, K]: w = scale · (q − zero_point), or scale · q + minimum; `channels`: int8's scales."""

    format: Format
    data: UInt8[Tensor, "E P G record"]  # P = ⌈N/16⌉
    channels: Float32[Tensor, "E P*16"] | None
    N: int
    K: int
    dtype: torch.dtype = torch.float32  # of activations

    def __len__(self) -> int:
        return len(self.data)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def bits(self) -> int:
        return 4 if self.format.startswith("int4") else 8

    @property
    def zero_point(self) -> int:
        return 0 if self.format == "int4_mins" else 1 << (self.bits - 1)


def pack(
    format: Format,
    q: UInt8[Tensor, "E N K"],
    scales: Float[Tensor, "E N G_or_1"],
    minima: Float[Tensor, "E N G"] | None = None,
) -> QuantizedWeight:
    """Pack 0 ≤ q < 2^bits; int8 has a scale an output, the others one a group."""
    E, N, K = q.shape
    P, G = -(-N // PANEL), -(-K // GROUP)
    packed = QuantizedWeight(format, q.new_empty(E, P, G, 0), None, N, K)
    more_rows = P * PANEL - N
    q = F.pad(q, (0, G * GROUP - K, 0, more_rows), value=packed.zero_point)
    q = q.view(E, P, PANEL, G, 8, 4).permute(0, 1, 3, 4, 2, 5)  # [E, P, G, 8, 16, 4]
    if packed.bits == 4:
        q = q[:, :, :, :4] | q[:, :, :, 4:] << 4
    parts = [q.flatten(3)]
    if format == "int8":
        packed.channels = F.pad(scales.float().squeeze(2), (0, more_rows)).contiguous()
    else:
        for values in (scales, minima):
            if values is not None:
                halves = F.pad(values.half(), (0, 0, 0, more_rows)).view(E, P, PANEL, G).transpose(2, 3).contiguous()
                parts.append(halves.view(torch.uint8).view(E, P, G, 2 * PANEL))
    packed.data = torch.cat(parts, dim=-1).contiguous()
    return packed


def packed_bytes(format: Format, shape: Sequence[int]) -> int:
    """Of packed weights [N, K] or [E, N, K]."""
    E, N, K = shape if len(shape) == 3 else (1, *shape)
    panels, bits = E * -(-N // PANEL), 4 if format.startswith("int4") else 8
    scales = {"int8": 0, "int4_mins": 4}.get(format, 2) * PANEL  # of a record
    channels = 4 * panels * PANEL if format == "int8" else 0
    return panels * -(-K // GROUP) * (GROUP * PANEL * bits // 8 + scales) + channels


def gather(parts: Iterable[QuantizedWeight], E: int, N: int) -> QuantizedWeight:
    """Concatenate parts [1, n, K] → [E, N, K], expert by expert; n is a multiple of 16, or the part ends an expert.
    With a generator, one part is in memory at a time."""
    parts, panels, at = iter(parts), -(-N // PANEL), 0
    part: QuantizedWeight | None = next(parts)
    data = part.data.new_empty(E * panels, *part.data.shape[2:])
    channels = None if part.channels is None else part.channels.new_empty(E * panels, PANEL)
    whole = replace(
        part,
        data=torch.unflatten(data, 0, (E, panels)),
        channels=None if channels is None else channels.view(E, panels * PANEL),
        N=N,
    )
    while part is not None:
        end = at + part.data.shape[1]
        data[at:end] = part.data[0]
        if channels is not None and part.channels is not None:
            channels[at:end] = part.channels.view(-1, PANEL)
        at, part = end, next(parts, None)
    return whole


def unpack_numbers(packed: QuantizedWeight) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N G_or_1"]]:
    """The first expert's q and scales, for int8 one an output."""
    _, P, G, _ = packed.data.shape
    size = 64 * packed.bits
    q = packed.data[0, ..., :size].view(P, G, -1, PANEL, 4)
    if packed.bits == 4:
        q = torch.cat([q & 15, q >> 4], dim=2)
    q = q.permute(0, 3, 1, 2, 4).reshape(P * PANEL, G * GROUP)
    if packed.channels is not None:
        scales = packed.channels[0].unsqueeze(1)
    else:
        halves = packed.data[0, ..., size : size + 2 * PANEL].contiguous().view(torch.float16)
        scales = halves.transpose(1, 2).reshape(P * PANEL, G)
    return q[: packed.N, : packed.K], scales[: packed.N]


def dequantize(
    packed: QuantizedWeight, expert: int = 0, rows: Int[Tensor, " n"] | None = None
) -> Float32[Tensor, "n K"]:
    """An expert's weights, or `rows` of them."""
    data = packed.data[expert]  # [P, G, ·]
    if rows is None:
        rows = torch.arange(packed.N, device=data.device)
    panel, within = rows // PANEL, rows % PANEL
    records = data[panel]  # [n, G, ·]
    n, G = records.shape[:2]
    size = 64 * packed.bits
    here = torch.arange(n, device=data.device)
    q = records[..., :size].view(n, G, -1, PANEL, 4)[here, :, :, within]  # [n, G, 8 or 4, 4]
    if packed.bits == 4:
        q = torch.cat([q & 15, q >> 4], dim=2)
    values = q.reshape(n, G, GROUP).float()
    if packed.channels is not None:
        values = (values - packed.zero_point) * packed.channels[expert][rows].view(n, 1, 1)
    else:
        tail = records[..., size:].contiguous().view(torch.float16).view(n, G, -1, PANEL)[here, :, :, within].float()
        values = (values - packed.zero_point) * tail[..., :1]
        if packed.format == "int4_mins":
            values = values + tail[..., 1:]
    return values.reshape(n, G * GROUP)[:, : packed.K]


def quantized_linear(
    x: Float[Tensor, "*batch K"],
    packed: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    ends: Int32[Tensor, " E"] | None = None,
) -> Float[Tensor, "*batch N"]:
    """x·weightᵀ + bias. With experts x is [M, K], and the rows of expert e end at ends[e]."""
    if x.ndim != 2:
        return quantized_linear(x.reshape(-1, x.shape[-1]), packed, bias).view(*x.shape[:-1], packed.N)
    if ends is None:
        ends = torch.tensor([len(x)], dtype=torch.int32)
    fits = packed.data.is_cpu and cpu.usable(x, *([] if bias is None else [bias]))
    if not fits or torch.is_grad_enabled():
        return quantized_linear_reference(x, packed, bias, ends)
    line = -(-packed.K // 64) * 64 + 64  # bytes of a row in either form of activations (cpu/csrc/quantized_rows.h)
    scratch = torch.empty((len(x) + 7) * 2 * line, dtype=torch.uint8)
    out = x.new_empty(len(x), packed.N)
    cpu.call(
        "quantized_linear", x.dtype, x, x.stride(0), packed.data, FORMATS.index(packed.format), packed.channels, bias,
        ends, len(ends), packed.N, packed.K, scratch, out,
    )  # fmt: skip
    return out


def quantized_linear_reference(
    x: Float[Tensor, "M K"], packed: QuantizedWeight, bias: Float[Tensor, " N"] | None, ends: Int32[Tensor, " E"]
) -> Float[Tensor, "M N"]:
    rounded = round_activations(x, packed.format)
    parts = rounded.tensor_split(ends[:-1].long().cpu())
    out = torch.cat(
        [
            part @ dequantize(packed, e).T if len(part) else rounded.new_zeros(0, packed.N)
            for e, part in enumerate(parts)
        ]
    )
    return (out if bias is None else out + bias).to(x.dtype)


def round_activations(x: Float[Tensor, "M K"], format: Format) -> Float32[Tensor, "M K"]:
    """x rounded as the compiled product does: to int8 with a scale for 32 numbers, or 96 for weights
    with one scale an output; for these a matrix unit takes 16 bits and one scale a row."""
    M, K = x.shape
    size, max_q, min_abs = GROUP * (ACTIVATION_GROUPS if format == "int8" else 1), 127, 2.0**-121
    if format == "int8" and cpu.has_matrix_unit():
        size, max_q, min_abs = K, 32512, 2.0**-113
    groups = F.pad(x.float(), (0, -K % size)).view(M, -(-K // size), size)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = largest / max_q
    rounded = torch.where(largest >= min_abs, groups / scale, 0.0 * groups).round()  # below, 1/scale would be infinite
    return (rounded * scale).flatten(1)[:, :K]
