"""What a cache tells attention: new tokens lie end to end, and each stretch of them has a past of its own."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class DecodeView:
    """New tokens that are one of each sequence: their past lies in blocks, in either store [blocks, places, …].

    Row i's past is its first `lengths[i]` places (int32), the new token's included; its blocks are tables[i] (int32).
    """

    tokens: slice
    a: Tensor
    b: Tensor
    tables: Tensor
    lengths: Tensor


@dataclass
class PrefillView:
    """New tokens of one sequence, the last of those whose past is a [1, S, …] and b [1, S, …]."""

    tokens: slice
    a: Tensor
    b: Tensor


CacheView = DecodeView | PrefillView


class KVCache(Protocol):
    """Keeps what a layer hands it of new tokens [1, N] and gives back the pasts of all of them, in order.

    For latent attention a are latents [1, N, C] and b rotated keys [1, N, R], else keys and values [1, N, G, W].
    """

    def append(self, layer: int, a: Tensor, b: Tensor) -> list[CacheView]: ...
