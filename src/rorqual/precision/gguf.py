"""GGUF files straight into packed weights, some rows at a time: no more memory than the weights and a few megabytes.

n rows, K in, G groups of 32 inputs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.quants import Q4_K
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.lowbit import GROUP, Format, Packed, join, pack
from rorqual.model import Transformer
from rorqual.model.gguf import open_gguf, outline, reading, reordered_head, tokenizer_of, unpermute
from rorqual.precision.lowbit import PackedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS = 2048  # at a time; a multiple of the panels' 16 and of any head's width
# Formats whose blocks of 32 we hold exactly as they are: bytes of a block, with its scale and minimum first.
EXACT: dict[GGMLQuantizationType, tuple[Format, int]] = {
    GGMLQuantizationType.Q4_0: ("int4", 18),
    GGMLQuantizationType.Q4_1: ("int4_mins", 20),
    GGMLQuantizationType.Q8_0: ("int8_groups", 34),
}


def load_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Transformer, "PreTrainedTokenizerFast"]:
    """A llama or qwen2 network with the weights as the file has them; `dtype` is that of norms, biases and cache.

    Q4_0, Q4_1 and Q8_0 stay what they are, Q4_K too but for scales rounded to FP16; other types become 8 bits with a
    scale for 32. Raises UserError for a file that is damaged or holds something else.
    """
    with reading(path):
        fields, stored = open_gguf(path)
        model, names = outline(fields, stored)
        for name, ours in names.items():
            module_name, _, parameter = ours.rpartition(".")
            module = model.get_submodule(module_name)
            tensor = stored[name]
            if len(tensor.shape) == 1:
                values = _finite(torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))), name)
                if (head := reordered_head(name, model.config)) is not None:
                    values = unpermute(values, head)
                setattr(module, parameter, nn.Parameter(values.to(dtype)))
                continue
            packed = _pack(tensor, name, reordered_head(name, model.config))
            packed.dtype = dtype
            if isinstance(module, nn.Embedding):
                model.model.embed_tokens = PackedEmbedding(packed)
            else:
                delattr(module, parameter)
                setattr(module, parameter, packed)
        tokenizer = tokenizer_of(fields, model.config)
    return model, tokenizer


def _finite(values: Tensor, name: str) -> Tensor:
    if not values.isfinite().all():
        raise UserError(f"tensor {name} holds numbers that are not finite; fetch the file again")
    return values


def _pack(tensor: Any, name: str, head: int | None) -> Packed:
    """head: the width of heads whose rows llama.cpp has reordered."""
    K, N = (int(n) for n in tensor.shape)
    parts = []
    for first in range(0, N, ROWS):
        data = np.array(tensor.data[first : first + ROWS])
        values = _finite(torch.from_numpy(dequantize(data, tensor.tensor_type)), name)
        format, scales, minima = _grid(data, tensor.tensor_type, values)
        if head is not None:
            values, scales = unpermute(values, head), unpermute(scales, head)
            minima = None if minima is None else unpermute(minima, head)
        wide = scales.half().float().repeat_interleave(GROUP, 1)[:, :K]
        least = 0.0 if minima is None else minima.half().float().repeat_interleave(GROUP, 1)[:, :K]
        middle, highest = {"int4": (8, 15), "int4_mins": (0, 15), "int8_groups": (128, 255)}[format]
        q = (torch.where(wide != 0, (values - least) / wide, 0.0) + middle).round().clamp(0, highest)
        parts.append(pack(format, *(t.unsqueeze(0) if t is not None else None for t in (q.byte(), scales, minima))))
    return join(parts)


def _grid(data: np.ndarray, kind: GGMLQuantizationType, values: Tensor) -> tuple[Format, Tensor, Tensor | None]:
    """On what numbers the values [n, K] lie: format, scales [n, G], minima [n, G] where there are some."""
    if kind in EXACT:
        format, size = EXACT[kind]
        halves = np.ascontiguousarray(data.reshape(len(data), -1, size)[:, :, :4]).view(np.float16).astype(np.float32)
        scales = _finite(torch.from_numpy(halves[..., 0]), str(kind.name))
        return format, scales, torch.from_numpy(halves[..., 1]) if format == "int4_mins" else None
    if kind == GGMLQuantizationType.Q4_K:
        blocks = data.reshape(-1, Q4_K.type_size)
        d, least = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32).T[..., None]
        sixths, minima = Q4_K.get_scale_min(blocks[:, 4:16])
        shape = len(data), -1
        scales, least = torch.from_numpy((d * sixths).reshape(shape)), torch.from_numpy((least * minima).reshape(shape))
        return "int4_mins", scales, -least
    groups = torch.nn.functional.pad(values, (0, -values.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    return "int8_groups", groups.abs().amax(-1) / 127, None
