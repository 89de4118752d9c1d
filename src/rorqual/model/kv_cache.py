"""The KV cache as attention sees it: new tokens [1, N] are concatenated, and each view holds the keys and values of a
slice of them.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rorqual.shapes import Float, Int32, UInt8


@dataclass
class DecodeView:
    """Decode: one new token of each of n sequences, with paged stores a and b.

    Row i attends to the first lengths[i] tokens, its own included, in the blocks tables[i]. FP8 stores are uint8
    (kernels/kv_fp8.py).
    """

    tokens: slice
    a: Float[Tensor, "blocks P *width_a"] | UInt8[Tensor, "blocks P *row_a"]
    b: Float[Tensor, "blocks P *width_b"] | UInt8[Tensor, "blocks P *row_b"]
    tables: Int32[Tensor, "n _"]
    lengths: Int32[Tensor, " n"]


@dataclass
class PrefillView:
    """Prefill: new tokens of one sequence, the last of the S tokens of a and b."""

    tokens: slice
    a: Float[Tensor, "1 S *width_a"]
    b: Float[Tensor, "1 S *width_b"]


CacheView = DecodeView | PrefillView


class KVCache(Protocol):
    """Stores a layer's a and b of new tokens [1, N] and returns views that cover all of these tokens, in order.

    For latent attention a are latents [1, N, C] and b rotated keys [1, N, R], else keys and values [1, N, G, W].
    """

    def append(self, layer: int, a: Tensor, b: Tensor) -> list[CacheView]: ...
