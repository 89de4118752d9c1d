"""The next tokens of running sequences in one call: drawn, noted, and who ends by them (cpu/decode.cpp).

The reference is engine/sampling.py, which does the same one array after the other.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.kernels import cpu

Integers = NDArray[np.int64]

LENGTH_REACHED, STOP_TOKEN = 1, 2  # why a sequence ends
# What has to be seen to: some sequence has ended; lacks room for its next token, or a random number; lacks a block.
FINISHED, NEEDS_PREPARE, NEEDS_BLOCKS = 1, 2, 4


class AppendTokens:
    """Where the arrays of engine/batch.py lie; to be made anew when one of them is."""

    def __init__(
        self, numbers: Integers, cuts: NDArray[np.float32], uniform: NDArray[np.float32], stops: Integers,
        tokens: Integers, logprobs: NDArray[np.float32], drafts: Integers, block: int,
    ) -> None:  # fmt: skip
        """numbers [11, n]; cuts [·, 4]: temperature, top_p, top_k, min_p; the others [n, ·]; block: places in one of
        the cache's.
        """
        self._kept = numbers, cuts, uniform, stops, tokens, logprobs, drafts
        where = [x for array in self._kept for x in (array.ctypes.data, array.shape[1])]
        self._where = torch.tensor([*where, block])

    def __call__(self, at: Integers, logits: Tensor, lanes: Integers | None = None) -> tuple[Integers, Integers, int]:
        """The sequences `at` [m] and logits [M, V] → their newest tokens [m]; why each has ended, or 0 [m]; and what
        has to be seen to. lanes [2, m]: the first of a sequence's logits, for the token after its newest, and how many
        there are: one more for every draft, which counts if all before it are right; None: one each.
        """
        m = len(at)
        found = np.empty((2, m + 1), dtype=np.int64)
        cpu.call(
            "extend", logits.dtype, logits.contiguous(), m, logits.shape[1], from_numpy(at),
            None if lanes is None else from_numpy(lanes), self._where, from_numpy(found),
        )  # fmt: skip
        return found[0, :m], found[1, :m], int(found[1, m])
