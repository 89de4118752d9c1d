"""A whole decode step in one call: a dense grouped-query network with packed weights, on a CPU (cpu/step.cpp).

The reference is the network itself: what this computes, `Transformer.logits` says too, up to rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.lowbit import FORMATS, Packed

Weights = tuple[Packed, Tensor | None]  # with a bias


@dataclass
class LayerWeights:
    norm: Tensor
    q: Weights
    k: Weights
    v: Weights
    o: Weights
    norm2: Tensor
    gate: Weights
    up: Weights
    down: Weights
    keys: Tensor  # of the cache: [blocks, block, G, W]
    values: Tensor


class DecodeStep:
    """Raises ValueError for tensors that it would misread."""

    def __init__(
        self, layers: list[LayerWeights], embedding: Packed, norm: Tensor, head: Packed, heads: int, interleave: bool,
        frequencies: Tensor, factor: float, scale: float, eps: float,
    ) -> None:  # fmt: skip
        """frequencies fp32 [W/2] and the factor of cos and sin: model/rope.py."""
        self._kept = (layers, embedding, norm, head, frequencies)  # what the numbers below point to
        keys = layers[0].keys
        self.dtype, self.block, self.words = keys.dtype, keys.shape[1], head.N
        self.factor, self.scale, self.eps = factor, scale, eps
        numbers = [n for layer in layers for n in self._layer(layer)]
        self._layers = torch.tensor(numbers, dtype=torch.int64)
        G, W = keys.shape[2:]
        sizes = [len(layers), embedding.K, heads, G, W, int(interleave)]
        whole = [
            self._layers.data_ptr(), *sizes, self._address(norm), *self._weights((embedding, None)),
            *self._weights((head, None)), self._address(frequencies, torch.float32),
        ]  # fmt: skip
        self._network = torch.tensor(whole, dtype=torch.int64)

    def __call__(self, tokens: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        """The next token of each of n sequences, int64 [n], which is number lengths[i] of its sequence (int32), in the
        blocks tables[i] (int32 [n, ·]) → logits fp32 [n, V]; keys and values go into the cache.
        """
        logits = torch.empty(len(tokens), self.words)
        cpu.call(
            "decode_step", self.dtype, self._network, tokens.contiguous(), len(tokens), tables, tables.stride(0),
            self.block, lengths, self.factor, self.scale, self.eps, logits,
        )  # fmt: skip
        return logits

    def _layer(self, layer: LayerWeights) -> list[int]:
        attention = [n for w in (layer.q, layer.k, layer.v, layer.o) for n in self._weights(w)]
        network = [n for w in (layer.gate, layer.up, layer.down) for n in self._weights(w)]
        cache = [self._address(layer.keys), self._address(layer.values)]
        return [self._address(layer.norm), *attention, self._address(layer.norm2), *network, *cache]

    def _weights(self, weights: Weights) -> list[int]:
        packed, bias = weights
        return [
            self._address(packed.data, torch.uint8),
            0 if packed.channels is None else self._address(packed.channels, torch.float32),
            0 if bias is None else self._address(bias),
            FORMATS.index(packed.format), packed.N, packed.K,
        ]  # fmt: skip

    def _address(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype != (dtype or self.dtype):
            raise ValueError(f"a tensor of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}")
        return tensor.data_ptr()
