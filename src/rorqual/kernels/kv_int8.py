"""The int8 KV cache in blocks of 16 slots, in the layout of cpu/csrc/kv_int8.h.

B blocks, G key/value heads of width W, R = ⌈W/32⌉ records. A record has 32 numbers of 16 slots, then the slots' scales
in FP16. Keys have the layout of weights (quantized_linear.py: int8_groups, a slot as an output); values are signed,
four slots interleaved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.quantized_linear import GROUP, PANEL
from rorqual.shapes import Float, Float32, Int, UInt8

DATA = GROUP * PANEL  # bytes of a record before its scales
RECORD = DATA + 2 * PANEL


def store_int8(
    keys: UInt8[Tensor, "B G R record"],
    values: UInt8[Tensor, "B G R record"],
    slots: Int[Tensor, " N"],
    k: Float[Tensor, "N G W"],
    v: Float[Tensor, "N G W"],
) -> None:
    """Quantise k and v into `slots` of the stores; slot s is in block s // 16."""
    block, slot = slots // PANEL, slots % PANEL
    for store, new, high in ((keys, k, True), (values, v, False)):
        G, R = store.shape[1:3]
        groups = torch.unflatten(F.pad(new.float(), (0, R * GROUP - new.shape[-1])), -1, (R, GROUP))
        scales = groups.abs().amax(-1, keepdim=True) / 127
        q = torch.where(scales > 0, groups / scales, 0.0 * groups).round().to(torch.int8).view(torch.uint8)
        numbers, tail = store[..., :DATA], torch.unflatten(store[..., DATA:], -1, (PANEL, 2))
        if high:
            whole = torch.unflatten(numbers, -1, (GROUP // 4, PANEL, 4))
            whole[block, :, :, :, slot] = torch.unflatten(q ^ 128, -1, (-1, 4))
        else:
            torch.unflatten(numbers, -1, (PANEL // 4, GROUP, 4))[block, :, :, slot // 4, :, slot % 4] = q
        tail[block, :, :, slot] = scales.half().view(torch.uint8).view(len(slots), G, R, 2)


def dequantize_keys(blocks: UInt8[Tensor, "B G R record"], width: int) -> Float32[Tensor, "B 16 G W"]:
    q = torch.unflatten(blocks[..., :DATA], -1, (GROUP // 4, PANEL, 4)).transpose(3, 4).flatten(4)  # [B, G, R, 16, 32]
    return _scaled(blocks, (q ^ 128).view(torch.int8), width)


def dequantize_values(blocks: UInt8[Tensor, "B G R record"], width: int) -> Float32[Tensor, "B 16 G W"]:
    q = torch.unflatten(blocks[..., :DATA], -1, (PANEL // 4, GROUP, 4))
    q = q.transpose(4, 5).flatten(3, 4)  # [B, G, R, 16, 32]
    return _scaled(blocks, q.view(torch.int8), width)


def _scaled(blocks: Tensor, q: Tensor, width: int) -> Tensor:
    scales = blocks[..., DATA:].contiguous().view(torch.float16).float()
    x = q.float() * scales.unsqueeze(-1)  # [B, G, R, 16, 32]
    return x.permute(0, 3, 1, 2, 4).flatten(3)[..., :width]
