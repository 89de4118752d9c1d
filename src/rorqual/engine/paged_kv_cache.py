"""The past of many sequences in blocks (Kwon et al. 2023, PagedAttention).

A layer keeps two numbers' worth of past a token: for latent attention the latent [C] and the rotated key [R]
(V2 §2.1.2), for grouped-query attention keys and values [G, W]. A sequence's table says in which blocks it lies.
Keys and values can be kept in 8 bits, with a scale for every 32 of them (kernels/kv_int8.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.block_manager import BLOCK
from rorqual.errors import UserError
from rorqual.kernels import kv_int8
from rorqual.kernels.quantized_linear import GROUP
from rorqual.model import ModelConfig
from rorqual.model.kv_cache import CacheView, DecodeView, PrefillView


def token_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """What a layer keeps of a token."""
    if config.is_mla:
        return [(config.kv_lora_rank,), (config.qk_rope_head_dim,)]
    return [(config.num_key_value_heads, config.head_dim)] * 2


def block_bytes(config: ModelConfig, dtype: torch.dtype, more_layers: int = 0) -> int:
    """What a block takes in all layers, and in those of multi-token modules that are used."""
    stored = [torch.Size(shape).numel() for shape in _block_shapes(config, dtype)]
    return sum(stored) * (config.num_hidden_layers + more_layers) * dtype.itemsize


def _block_shapes(config: ModelConfig, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """How what a layer keeps of a block's tokens lies."""
    shapes = token_shapes(config)
    if dtype is not torch.int8:
        return [(BLOCK, *shape) for shape in shapes]
    if config.is_mla:
        raise UserError(
            "a cache of 8 bits is for grouped-query attention; this model's latent attention keeps few numbers a token "
            "already: leave the cache as the model computes"
        )
    return [(heads, -(-width // GROUP), kv_int8.RECORD) for heads, width in shapes]


class PagedKVCache:
    """Room for `count` blocks in every layer, of numbers as the network computes them or (dtype int8) of 8 bits."""

    def __init__(
        self, config: ModelConfig, count: int, dtype: torch.dtype, device: torch.device, more_layers: int = 0
    ) -> None:
        self.eight = dtype is torch.int8
        # Zeros, not whatever was in memory: a hidden place has weight 0, but 0 times a stray NaN is NaN. On a CPU
        # they cost no memory before they are written to.
        self.layers = [
            tuple(
                torch.zeros(count, *shape, dtype=torch.uint8 if self.eight else dtype, device=device)
                for shape in _block_shapes(config, dtype)
            )
            for _ in range(config.num_hidden_layers + more_layers)
        ]
        self.places = [tuple(store.flatten(0, 1) for store in layer) for layer in self.layers]  # the same, by place

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy blocks over others."""
        device = self.layers[0][0].device
        source, target = (torch.tensor(blocks, device=device) for blocks in (sources, targets))
        for store in (s for layer in self.layers for s in layer):
            store[target] = store[source]


@dataclass
class PrefillSlice:
    """`length` tokens of one sequence that a pass computes, the first of them in place `start`; its blocks."""

    start: int
    length: int
    blocks: list[int]


class KVCacheView:
    """Cache argument of one pass over tokens end to end [1, N]: one token of each of the running sequences, whose
    tables [rows, ·] and places [rows] are given, then pieces of prompts.
    """

    def __init__(self, cache: PagedKVCache, tables: Tensor, places: Tensor, prompts: list[PrefillSlice]) -> None:
        self.cache, self.prompts = cache, prompts
        device = cache.layers[0][0].device
        self.rows = len(places)
        at = tables.gather(1, (places // BLOCK).unsqueeze(1)).squeeze(1).long() * BLOCK + places % BLOCK
        index, positions = [at], [places]
        self.tables = []
        for p in prompts:
            here = torch.arange(p.start, p.start + p.length)
            table = torch.tensor(p.blocks)
            self.tables.append(table.to(device))
            index.append(table[here // BLOCK] * BLOCK + here % BLOCK)
            positions.append(here)
        self.index = torch.cat(index).to(device)
        self.positions = torch.cat(positions).unsqueeze(0).to(device)
        span = -(-(int(places.max()) + 1) // BLOCK) if self.rows else 0
        self.row_tables = tables[:, :span].to(torch.int32).contiguous().to(device)
        self.lengths = (places + 1).to(torch.int32).to(device)

    def append(self, layer: int, a: Tensor, b: Tensor) -> list[CacheView]:
        stores = self.cache.layers[layer]
        if self.cache.eight:
            kv_int8.store_int8(*stores, self.index, a[0], b[0])
        else:
            for places, new in zip(self.cache.places[layer], (a, b), strict=True):
                places.index_copy_(0, self.index, new[0])
        pasts: list[CacheView] = []
        if self.rows:
            tables = self.row_tables
            if self.cache.eight:  # the blocks there are, one after the other
                stores = self._unpacked(stores, tables.flatten(), a)
                tables = torch.arange(tables.numel(), dtype=torch.int32, device=tables.device).view_as(tables)
            pasts.append(DecodeView(slice(0, self.rows), *stores, tables, self.lengths))
        first = self.rows
        for p, table in zip(self.prompts, self.tables, strict=True):
            tokens, end = slice(first, first + p.length), p.start + p.length
            first += p.length
            blocks = table[: -(-end // BLOCK)]
            if self.cache.eight:
                past = [s.flatten(0, 1)[None, :end] for s in self._unpacked(self.cache.layers[layer], blocks, a)]
            elif p.start == 0:
                past = [x[:, tokens] for x in (a, b)]
            else:
                past = [s.index_select(0, blocks).flatten(0, 1)[None, :end] for s in stores]
            pasts.append(PrefillView(tokens, *past))
        return pasts

    def _unpacked(self, stores: tuple[Tensor, ...], blocks: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Blocks [n] of both stores → [n, BLOCK, G, W]."""
        unpack = (kv_int8.dequantize_keys, kv_int8.dequantize_values)
        return tuple(f(s[blocks.long()], like.shape[-1]).to(like.dtype) for f, s in zip(unpack, stores, strict=True))
