"""The past of many sequences at once.

A layer keeps two numbers' worth of past a token: for latent attention the latent [C] and the rotated key [R]
(V2 §2.1.2), for grouped-query attention keys and values [G, W]. Sequences live in rows 0…n-1 without holes, so a
decode step reads plain slices.
"""

import torch
from torch import Tensor

from rorqual.model import ModelConfig


class RowCache:
    """Room for `rows` sequences of up to `length` tokens."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        if config.is_mla:
            shapes = [(config.kv_lora_rank,), (config.qk_rope_head_dim,)]
        else:
            shapes = [(config.num_key_value_heads, config.head_dim)] * 2
        # Zeros, not whatever was in memory: a hidden place has weight 0, but 0 times a stray NaN is NaN.
        self.layers = [
            tuple(torch.zeros(rows, length, *shape, dtype=dtype, device=device) for shape in shapes)
            for _ in range(config.num_hidden_layers)
        ]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` tokens of rows `source` over rows `target`."""
        for store in (s for layer in self.layers for s in layer):
            store[target, :length] = store[source, :length]


class Prefill:
    """Cache argument of a prompt pass: prompt p of the pass becomes the rows of `start`… whose `prompt_of` is p."""

    def __init__(self, cache: RowCache, start: int, prompt_of: Tensor) -> None:
        self.cache, self.prompt_of = cache, prompt_of
        self.rows = slice(start, start + len(prompt_of))

    def append(self, layer: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for store, new in zip(self.cache.layers[layer], (a, b), strict=True):
            store[self.rows, : new.shape[1]] = new.index_select(0, self.prompt_of)
        return a, b


class Decode:
    """Cache argument of a decode step: row i's new token goes to place `at[i]`; `mask` hides what lies beyond it."""

    def __init__(self, cache: RowCache, at: Tensor) -> None:
        self.cache, self.at = cache, at
        self.rows = torch.arange(len(at), device=at.device)
        self.span = int(at.max()) + 1
        self.mask = (torch.arange(self.span, device=at.device) <= at.unsqueeze(1))[:, None, None]

    def append(self, layer: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        past = []
        for store, new in zip(self.cache.layers[layer], (a, b), strict=True):
            store.index_put_((self.rows, self.at), new.squeeze(1))
            past.append(store[: len(self.at), : self.span])
        return past[0], past[1]
