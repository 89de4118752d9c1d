"""The paged KV cache (Kwon et al. 2023, PagedAttention).

A layer stores two tensors a token: for latent attention the latent [C] and the rotated key [R] (V2 §2.1.2), for
grouped-query attention keys and values [G, W]. A sequence's block table lists its blocks; slot b·BLOCK + i is token i
of block b. Keys and values can be int8, with a scale for every 32 (kernels/kv_int8.py). Keys, values and latents can
be FP8, with a scale for every 128 (kernels/kv_fp8.py); rotated keys are BF16 then.
"""

import math
import mmap
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rorqual.engine.block_manager import BLOCK
from rorqual.errors import UserError
from rorqual.kernels import kv_fp8, kv_int8
from rorqual.kernels.quantized_linear import GROUP
from rorqual.model import ModelConfig
from rorqual.model.kv_cache import CacheView, DecodeView, PrefillView

FP8 = torch.float8_e4m3fn
Shape = tuple[int, ...]


def token_shapes(config: ModelConfig) -> tuple[Shape, Shape]:
    """Shapes of the two tensors that a layer stores a token."""
    if config.is_mla:
        return (config.mla.kv_lora_rank,), (config.mla.qk_rope_head_dim,)
    keys = config.gqa.num_key_value_heads, config.gqa.head_dim
    return keys, keys


def block_bytes(config: ModelConfig, dtype: torch.dtype, more_layers: int = 0) -> int:
    """Bytes of a block in all layers, and in `more_layers` of multi-token modules."""
    stored = [math.prod(shape) * stored.itemsize for shape, stored in _block_stores(config, dtype)]
    return sum(stored) * (config.num_hidden_layers + more_layers)


def _block_stores(config: ModelConfig, dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
    """Shapes and dtypes of the two tensors that a layer stores a block. Raises UserError for int8 with latent
    attention.
    """
    a, b = token_shapes(config)
    if dtype is torch.int8:
        if config.is_mla:
            raise UserError(
                "an int8 KV cache is for grouped-query attention, and this model has latent attention; "
                "use --kv-cache-dtype fp8"
            )
        keys = config.gqa.num_key_value_heads, -(-config.gqa.head_dim // GROUP), kv_int8.RECORD
        return [(keys, torch.uint8)] * 2
    if dtype is FP8:
        rows = (BLOCK, *a[:-1], kv_fp8.row_bytes(a[-1])), torch.uint8
        return [rows, ((BLOCK, *b), torch.bfloat16) if config.is_mla else rows]
    return [((BLOCK, *a), dtype), ((BLOCK, *b), dtype)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they are pages of the system, which cost neither memory nor time before they are written to;
    torch.zeros writes all of them. Raises RuntimeError if memory lacks.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)  # private
    except OSError as e:
        raise RuntimeError(f"KV cache: {e.strerror}") from e
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class PagedKVCache:
    """`count` blocks in every layer, of `dtype`: the model's own, int8 or FP8.

    `choices` [count, BLOCK, L, K], with `record_routing`: the experts that the routers of the L mixture-of-experts
    layers chose for each token.
    """

    def __init__(
        self, config: ModelConfig, count: int, dtype: torch.dtype, device: torch.device, more_layers: int = 0,
        record_routing: bool = False,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        a, b = (partial(_zeros, (count, *shape), stored, device) for shape, stored in _block_stores(config, dtype))
        self.layers = [(a(), b()) for _ in range(config.num_hidden_layers + more_layers)]
        self.slots = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in self.layers]  # the same, by slot
        self.choices: Tensor | None = None
        if record_routing:
            depth = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
            shape = count, BLOCK, depth, config.moe.num_experts_per_tok
            self.choices = _zeros(shape, torch.int16, device)

    def append(self, layer: int, slots: Tensor, a: Tensor, b: Tensor) -> None:
        """Write new tokens' a [N, …] and b [N, …] into `slots` [N]."""
        stores = self.layers[layer]
        if self.dtype is torch.int8:
            return kv_int8.store_int8(*stores, slots, a, b)
        for store, by_slot, new in zip(stores, self.slots[layer], (a, b), strict=True):
            if store.dtype is torch.uint8:
                _store_fp8(store, slots, new)
            else:
                by_slot.index_copy_(0, slots, new.to(store.dtype))

    def gather(self, layer: int, blocks: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [n] of both stores → [n, BLOCK, …], dequantised: of the widths and dtypes of a and b."""
        keys, values = (store.index_select(0, blocks) for store in self.layers[layer])
        if self.dtype is torch.int8:
            keys = kv_int8.dequantize_keys(keys, a.shape[-1])
            values = kv_int8.dequantize_values(values, b.shape[-1])
        elif self.dtype is FP8:
            keys = kv_fp8.dequantize(keys, a.shape[-1])
            values = kv_fp8.dequantize(values, b.shape[-1]) if values.dtype is torch.uint8 else values
        return keys.to(a.dtype), values.to(b.dtype)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy the blocks `sources` to `targets`."""
        device = self.layers[0][0].device
        source, target = (torch.tensor(blocks, device=device) for blocks in (sources, targets))
        stores = [s for layer in self.layers for s in layer]
        for store in stores if self.choices is None else [*stores, self.choices]:
            store[target] = store[source]

    def routing(self, blocks: list[int], length: int) -> Tensor | None:
        """Of the first `length` tokens of a sequence: [length, L, K]; None where it is not recorded."""
        return None if self.choices is None else self.choices[blocks].flatten(0, 1)[:length].cpu()


@dataclass
class PrefillSlice:
    """`length` tokens of one sequence, the first at position `start`; `blocks`: its block table."""

    start: int
    length: int
    blocks: list[int]


class KVCacheView:
    """The KV cache of one forward pass over tokens [1, N]: the tokens of decode, then the prefill slices.

    tables int32 [n, ·] and positions [n]: the block table and the position of each token of decode.
    """

    def __init__(self, cache: PagedKVCache, tables: Tensor, positions: Tensor, prefill: list[PrefillSlice]) -> None:
        self.cache, self.prefill = cache, prefill
        device = cache.layers[0][0].device
        self.num_decode = len(positions)
        block = tables.gather(1, (positions // BLOCK).unsqueeze(1)).squeeze(1).long()
        slots, all_positions = [block * BLOCK + positions % BLOCK], [positions]
        self.prefill_tables = []
        for p in prefill:
            at = torch.arange(p.start, p.start + p.length)
            table = torch.tensor(p.blocks)
            self.prefill_tables.append(table.to(device))
            slots.append(table[at // BLOCK] * BLOCK + at % BLOCK)
            all_positions.append(at)
        self.slot_mapping = torch.cat(slots).to(device)
        self.positions = torch.cat(all_positions).unsqueeze(0).to(device)
        num_blocks = -(-(int(positions.max()) + 1) // BLOCK) if self.num_decode else 0
        self.block_tables = tables[:, :num_blocks].to(torch.int32).contiguous().to(device)
        self.lengths = (positions + 1).to(torch.int32).to(device)

    def append(self, layer: int, a: Tensor, b: Tensor) -> list[CacheView]:
        cache = self.cache
        cache.append(layer, self.slot_mapping, a[0], b[0])
        views: list[CacheView] = []
        if self.num_decode:
            stores, tables = cache.layers[layer], self.block_tables
            if cache.dtype is torch.int8:  # dequantised blocks are stored in the order of the tables
                stores = cache.gather(layer, tables.flatten(), a, b)
                tables = torch.arange(tables.numel(), dtype=torch.int32, device=tables.device).view_as(tables)
            views.append(DecodeView(slice(0, self.num_decode), *stores, tables, self.lengths))
        first = self.num_decode
        for p, table in zip(self.prefill, self.prefill_tables, strict=True):
            tokens, end = slice(first, first + p.length), p.start + p.length
            first += p.length
            if p.start == 0 and cache.dtype is a.dtype:
                views.append(PrefillView(tokens, a[:, tokens], b[:, tokens]))
                continue
            keys, values = cache.gather(layer, table[: -(-end // BLOCK)], a, b)
            views.append(PrefillView(tokens, keys.flatten(0, 1)[None, :end], values.flatten(0, 1)[None, :end]))
        return views


def _store_fp8(store: Tensor, slots: Tensor, new: Tensor) -> None:
    """A latent is a row of one head."""
    if store.ndim == 3:
        store, new = store.unsqueeze(2), new.unsqueeze(1)
    kv_fp8.store_fp8(store, slots, new)
