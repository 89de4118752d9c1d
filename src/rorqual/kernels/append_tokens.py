"""Sample the next tokens of a decode batch and append them, in one call (cpu/csrc/sampling.cpp).

The reference is engine/sampling.py, which does the same array by array.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from rorqual.kernels import cpu

Integers = NDArray[np.int64]

# The rows of `numbers`, as the enum BatchNumber of cpu/csrc/sampling.cpp.
NUMBERS = (
    "position", "num_tokens", "max_new_tokens", "last_token", "num_blocks", "budget", "think_end_token", "filter_index",
    "thinking_ended", "needs_adjusting", "streaming",
)  # fmt: skip
FILTER_COLUMNS = ("temperature", "top_p", "top_k", "min_p")
LENGTH_REACHED, STOP_TOKEN = 1, 2  # why a sequence finished; 0: it did not
# What the batch needs next: a sequence finished; one needs wider arrays or new random numbers; one needs a block.
FINISHED, NEEDS_PREPARE, NEEDS_BLOCKS = 1, 2, 4


class AppendTokens:
    """Holds the addresses of the arrays of engine/batch.py; to be made anew when one of them is reallocated."""

    def __init__(
        self, numbers: Integers, cuts: NDArray[np.float32], uniform: NDArray[np.float32], stops: Integers,
        tokens: Integers, logprobs: NDArray[np.float32], drafts: Integers, block: int,
    ) -> None:  # fmt: skip
        """numbers [len(NUMBERS), n]; cuts [·, len(FILTER_COLUMNS)]; the others [n, ·]; block: tokens per block of the
        KV cache. The order is that of BatchState in cpu/csrc/sampling.cpp.
        """
        self._kept = numbers, cuts, uniform, stops, tokens, logprobs, drafts
        where = [x for array in self._kept for x in (array.ctypes.data, array.shape[1])]
        self._where = torch.tensor([*where, block])

    def __call__(self, at: Integers, logits: Tensor, lanes: Integers | None = None) -> tuple[Integers, Integers, int]:
        """The sequences `at` [m] and logits [M, V] → their newest tokens [m]; why each finished, or 0 [m]; and flags of
        what the batch needs. lanes [2, m]: each sequence's first row of logits and their number, one for its newest
        token and one per draft; a draft is accepted if all before it are. None: one row each.
        """
        m = len(at)
        found = np.empty((2, m + 1), dtype=np.int64)
        cpu.call(
            "append_tokens", logits.dtype, logits.contiguous(), m, logits.shape[1], from_numpy(at),
            None if lanes is None else from_numpy(lanes), self._where, from_numpy(found),
        )  # fmt: skip
        return found[0, :m], found[1, :m], int(found[1, m])
