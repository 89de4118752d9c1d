"""Keys and values of 8 bits in blocks of 16 places: how they lie there, as cpu/csrc/kv_int8.h has it.

B blocks, G key/value heads of width W, R = ⌈W/32⌉ records. A record has 32 numbers of 16 places, then the places'
scales in FP16. Keys lie as weights do (quantized_linear.py: int8_groups, a place being an output), values signed, four
places side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.quantized_linear import GROUP, PANEL

NUMBERS = GROUP * PANEL  # bytes of a record before its scales
RECORD = NUMBERS + 2 * PANEL


def store_int8(keys: Tensor, values: Tensor, index: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k and v [N, G, W] into the places `index` [N] of stores [B, G, R, RECORD]; place p is in block p // 16."""
    block, place = index // PANEL, index % PANEL
    for store, new, high in ((keys, k, True), (values, v, False)):
        G, R = store.shape[1:3]
        groups = F.pad(new.float(), (0, R * GROUP - new.shape[-1])).unflatten(-1, (R, GROUP))
        scales = groups.abs().amax(-1, keepdim=True) / 127
        q = torch.where(scales > 0, groups / scales, 0.0 * groups).round().to(torch.int8).view(torch.uint8)
        numbers, tail = store[..., :NUMBERS], store[..., NUMBERS:].unflatten(-1, (PANEL, 2))
        if high:
            numbers.unflatten(-1, (GROUP // 4, PANEL, 4))[block, :, :, :, place] = (q ^ 128).unflatten(-1, (-1, 4))
        else:
            numbers.unflatten(-1, (PANEL // 4, GROUP, 4))[block, :, :, place // 4, :, place % 4] = q
        tail[block, :, :, place] = scales.half().view(torch.uint8).view(len(index), G, R, 2)


def dequantize_keys(blocks: Tensor, width: int) -> Tensor:
    """[B, G, R, RECORD] → fp32 [B, 16, G, W]."""
    q = blocks[..., :NUMBERS].unflatten(-1, (GROUP // 4, PANEL, 4)).transpose(3, 4).flatten(4)  # [B, G, R, 16, 32]
    return _scaled(blocks, (q ^ 128).view(torch.int8), width)


def dequantize_values(blocks: Tensor, width: int) -> Tensor:
    """[B, G, R, RECORD] → fp32 [B, 16, G, W]."""
    q = blocks[..., :NUMBERS].unflatten(-1, (PANEL // 4, GROUP, 4)).transpose(4, 5).flatten(3, 4)  # [B, G, R, 16, 32]
    return _scaled(blocks, q.view(torch.int8), width)


def _scaled(blocks: Tensor, q: Tensor, width: int) -> Tensor:
    scales = blocks[..., NUMBERS:].contiguous().view(torch.float16).float()
    x = q.float() * scales.unsqueeze(-1)  # [B, G, R, 16, 32]
    return x.permute(0, 3, 1, 2, 4).flatten(3)[..., :width]
