"""The paged KV cache (Kwon et al. 2023, PagedAttention).

A layer stores two tensors a token: for latent attention the latent [C] and the rotated key [R] (V2 §2.1.2), for
grouped-query attention keys and values [G, W]. A sequence's block table lists its blocks; slot b·BLOCK + i is token i
of block b. Keys and values can be int8, with a scale for every 32 (kernels/kv_int8.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rorqual.engine.block_manager import BLOCK
from rorqual.errors import UserError
from rorqual.kernels import kv_int8
from rorqual.kernels.quantized_linear import GROUP
from rorqual.model import ModelConfig
from rorqual.model.kv_cache import CacheView, DecodeView, PrefillView

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def token_shapes(config: ModelConfig) -> Shapes:
    """Shapes of the two tensors that a layer stores a token."""
    if config.is_mla:
        return (config.mla.kv_lora_rank,), (config.mla.qk_rope_head_dim,)
    keys = config.gqa.num_key_value_heads, config.gqa.head_dim
    return keys, keys


def block_bytes(config: ModelConfig, dtype: torch.dtype, more_layers: int = 0) -> int:
    """Bytes of a block in all layers, and in `more_layers` of multi-token modules."""
    stored = [torch.Size(shape).numel() for shape in _block_shapes(config, dtype)]
    return sum(stored) * (config.num_hidden_layers + more_layers) * dtype.itemsize


def _block_shapes(config: ModelConfig, dtype: torch.dtype) -> Shapes:
    """Shapes of the two tensors that a layer stores a block. Raises UserError for int8 with latent attention."""
    if dtype is not torch.int8:
        a, b = token_shapes(config)
        return (BLOCK, *a), (BLOCK, *b)
    if config.is_mla:
        raise UserError(
            "an int8 KV cache is for grouped-query attention, and this model has latent attention, whose KV cache is "
            "small already; leave out --kv-cache-dtype"
        )
    keys = config.gqa.num_key_value_heads, -(-config.gqa.head_dim // GROUP), kv_int8.RECORD
    return keys, keys


class PagedKVCache:
    """`count` blocks in every layer, of `dtype`: the model's own, or int8."""

    def __init__(
        self, config: ModelConfig, count: int, dtype: torch.dtype, device: torch.device, more_layers: int = 0
    ) -> None:
        self.is_int8 = dtype is torch.int8
        # Zeros, not uninitialised memory: a masked position has weight 0, but 0 times a stray NaN is NaN. On a CPU
        # they cost no memory before they are written to.
        a, b = _block_shapes(config, dtype)
        zeros = partial(torch.zeros, dtype=torch.uint8 if self.is_int8 else dtype, device=device)
        depth = config.num_hidden_layers + more_layers
        self.layers = [(zeros(count, *a), zeros(count, *b)) for _ in range(depth)]
        self.slots = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in self.layers]  # the same, by slot

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy the blocks `sources` to `targets`."""
        device = self.layers[0][0].device
        source, target = (torch.tensor(blocks, device=device) for blocks in (sources, targets))
        for store in (s for layer in self.layers for s in layer):
            store[target] = store[source]


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
        stores = self.cache.layers[layer]
        if self.cache.is_int8:
            kv_int8.store_int8(*stores, self.slot_mapping, a[0], b[0])
        else:
            for slots, new in zip(self.cache.slots[layer], (a, b), strict=True):
                slots.index_copy_(0, self.slot_mapping, new[0])
        views: list[CacheView] = []
        if self.num_decode:
            tables = self.block_tables
            if self.cache.is_int8:  # dequantised blocks are stored in the order of the tables
                stores = self._dequantize(stores, tables.flatten(), a)
                tables = torch.arange(tables.numel(), dtype=torch.int32, device=tables.device).view_as(tables)
            views.append(DecodeView(slice(0, self.num_decode), *stores, tables, self.lengths))
        first = self.num_decode
        for p, table in zip(self.prefill, self.prefill_tables, strict=True):
            tokens, end = slice(first, first + p.length), p.start + p.length
            first += p.length
            blocks = table[: -(-end // BLOCK)]
            if self.cache.is_int8:
                keys, values = self._dequantize(self.cache.layers[layer], blocks, a)
            elif p.start == 0:
                views.append(PrefillView(tokens, a[:, tokens], b[:, tokens]))
                continue
            else:
                keys, values = (s.index_select(0, blocks) for s in stores)
            views.append(PrefillView(tokens, keys.flatten(0, 1)[None, :end], values.flatten(0, 1)[None, :end]))
        return views

    def _dequantize(self, stores: tuple[Tensor, Tensor], blocks: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [n] of both stores → [n, BLOCK, G, W]."""
        keys, values = (store[blocks.long()] for store in stores)
        width = like.shape[-1]
        return (
            kv_int8.dequantize_keys(keys, width).to(like.dtype),
            kv_int8.dequantize_values(values, width).to(like.dtype),
        )
