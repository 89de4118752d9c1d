"""Load GGUF files as quantised weights, a few rows at a time: memory for the weights and a few megabytes.

E experts, n rows, K in, G groups of 32 inputs.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from gguf.quants import Q4_K
from torch import Tensor, nn

from rorqual.checkpoint.gguf_file import GGUFTensor, open_gguf
from rorqual.checkpoint.gguf_import import fill, outline, part, reading, reordered_head, slice_rows, unpermute
from rorqual.checkpoint.gguf_tokenizer import tokenizer_of
from rorqual.checkpoint.release_tensors import replace_weight
from rorqual.errors import UserError
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.kernels.quantized_linear import GROUP, PANEL, Format, QuantizedWeight, gather, pack
from rorqual.model import Transformer
from rorqual.model.moe import Router
from rorqual.precision.quantize import packable, replace_embedding
from rorqual.process_tuning import release_memory
from rorqual.tokenizer_protocol import Tokenizer

# GGUF types kept without loss (Q4_K: with rounded scales). Others become int8_groups.
FORMATS: dict[GGMLQuantizationType, Format] = {
    GGMLQuantizationType.Q4_0: "int4",
    GGMLQuantizationType.Q4_1: "int4_mins",
    GGMLQuantizationType.Q4_K: "int4_mins",
    GGMLQuantizationType.Q8_0: "int8_groups",
}
BLOCK_BYTES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}


def load_gguf(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """Load a llama, qwen2 or deepseek2 model with quantised weights as in the file; `dtype`: of all others, by default
    the fastest.

    Q4_0, Q4_1 and Q8_0 are kept exactly, Q4_K with scales rounded to FP16; other types become int8 with a scale for 32.
    Not quantised are norms, biases, latent attention's up-projections and, in FP32, routers. Raises UserError for a
    damaged or unsupported file.
    """
    dtype = dtype or fastest_dtype()
    with reading(path):
        fields, stored = open_gguf(path)
        model, sources = outline(fields, stored)
        tokenizer = tokenizer_of(fields, model.config)
        fields.clear()
        for target, names in sources.items():
            release_memory()  # of the previous tensor
            module_name, _, own = target.rpartition(".")
            module, head = model.get_submodule(module_name), reordered_head(names[0], model.config)
            if isinstance(module, nn.Embedding) or (packable(module) and own != "bias"):
                packed = pack_stored([stored[name] for name in names], head)
                packed.dtype = dtype
                if isinstance(module, nn.Embedding):
                    replace_embedding(model, packed)
                else:
                    replace_weight(module, own, packed)
                continue
            like = getattr(module, own)
            values = torch.empty(like.shape, dtype=torch.float32 if isinstance(module, Router) else dtype)
            for name in names:
                fill(part(values, name, model.config), stored[name], head)
            setattr(module, own, nn.Parameter(values) if isinstance(like, nn.Parameter) else values)
    return model, tokenizer


def pack_stored(tensors: list[GGUFTensor], head: int | None = None) -> QuantizedWeight:
    """Pack tensors [n, K] or [E, n, K], outputs concatenated. head: width of heads whose rows are to be reordered."""
    formats: set[Format] = {FORMATS.get(t.kind, "int8_groups") for t in tensors}
    format: Format = formats.pop() if len(formats) == 1 else "int8_groups"
    *experts, _, K = tensors[0].shape
    E, N = math.prod(experts), sum(t.shape[-2] for t in tensors)
    step = slice_rows(K, math.lcm(PANEL, head or 1))

    def chunks() -> Iterator[QuantizedWeight]:
        for e, first in itertools.product(range(E), range(0, N, step)):
            slices = [_numbers(t, a, b, format, head) for t, a, b in _rows(tensors, e, first, min(first + step, N))]
            q, scales = torch.cat([q for q, _, _ in slices]), torch.cat([scales for _, scales, _ in slices])
            minima = [minima for _, _, minima in slices if minima is not None]
            yield pack(format, q[None], scales[None], torch.cat(minima)[None] if minima else None)

    return gather(chunks(), E, N)


def _rows(tensors: list[GGUFTensor], e: int, first: int, last: int) -> Iterator[tuple[GGUFTensor, int, int]]:
    """The tensors and row ranges that make rows [first, last) of an expert's concatenated tensors."""
    for tensor in tensors:
        n = tensor.shape[-2]
        if max(first, 0) < min(last, n):
            yield tensor, e * n + max(first, 0), e * n + min(last, n)
        first, last = first - n, last - n


def _numbers(
    tensor: GGUFTensor, first: int, last: int, format: Format, head: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of a tensor in `format`: q uint8 [n, K], scales [n, G], minima [n, G] or None. Raises UserError."""
    data = tensor.blocks(first, last)
    values = tensor.expand(data)
    scales, minima = _grid(data, tensor.kind, values, format)
    if head is not None:
        values, scales = unpermute(values, head), unpermute(scales, head)
        minima = None if minima is None else unpermute(minima, head)
    K = values.shape[1]
    if not scales.half().isfinite().all():
        raise UserError(f"tensor {tensor.name} holds numbers that overflow FP16 scales; fetch the file again")
    wide = scales.half().float().repeat_interleave(GROUP, 1)[:, :K]
    minimum = 0.0 if minima is None else minima.half().float().repeat_interleave(GROUP, 1)[:, :K]
    zero_point, highest = {"int4": (8, 15), "int4_mins": (0, 15), "int8_groups": (128, 255)}[format]
    q = (torch.where(wide != 0, (values - minimum) / wide, 0.0) + zero_point).round().clamp(0, highest)
    return q.byte(), scales, minima


def _grid(data: np.ndarray, kind: GGMLQuantizationType, values: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """The quantisation grid of values [n, K]: scales [n, G], minima [n, G] or None."""
    if FORMATS.get(kind) != format:
        groups = F.pad(values, (0, -values.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        return groups.abs().amax(-1) / 127, None
    if kind == GGMLQuantizationType.Q4_K:
        blocks = data.reshape(-1, Q4_K.type_size)
        d, minimum = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32).T[..., None]
        sixths, minima = Q4_K.get_scale_min(blocks[:, 4:16])
        shape = len(data), -1
        return torch.from_numpy((d * sixths).reshape(shape)), torch.from_numpy(-(minimum * minima).reshape(shape))
    blocks = data.reshape(len(data), -1, BLOCK_BYTES[kind])
    halves = np.ascontiguousarray(blocks[:, :, :4]).view(np.float16).astype(np.float32)
    return torch.from_numpy(halves[..., 0]), torch.from_numpy(halves[..., 1]) if format == "int4_mins" else None
