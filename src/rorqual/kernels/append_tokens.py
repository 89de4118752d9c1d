"""Sample, append and stop-check the next tokens of running sequences in one call (cpu/csrc/sampling.cpp).

The reference is engine.sampling.sample_and_append_reference.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import (
    Tensor,
    from_numpy,  # pyright: ignore[reportUnknownVariableType] -- torch's stub gives its argument no type
)

from rorqual.kernels import cpu
from rorqual.shapes import Float

Integers = NDArray[np.int64]

# The rows of `numbers`, as the enum BatchNumber of cpu/csrc/sampling.cpp.
NUMBERS = (
    "position", "num_tokens", "max_new_tokens", "last_token", "num_blocks", "budget", "think_end_token", "filter_index",
    "thinking_ended", "needs_adjusting", "streaming",
)  # fmt: skip
FILTER_COLUMNS = ("temperature", "top_p", "top_k", "min_p")
LENGTH_REACHED, STOP_TOKEN = 1, 2  # why a sequence has finished
# Flags: some sequence has finished; lacks array space or a random number for its next token; lacks a block.
FINISHED, NEEDS_PREPARE, NEEDS_BLOCKS = 1, 2, 4


class AppendTokens:
    """Holds the addresses of a DecodeBatch's arrays; must be remade when one of them is reallocated."""

    def __init__(
        self, numbers: Integers, filters: NDArray[np.float32], uniform: NDArray[np.float32], stops: Integers,
        tokens: Integers, logprobs: NDArray[np.float32], drafts: Integers, block: int,
    ) -> None:  # fmt: skip
        """numbers [len(NUMBERS), n]; filters [·, len(FILTER_COLUMNS)]; the others [n, ·]; block: tokens a block of the
        KV cache. The order is that of BatchState in cpu/csrc/sampling.cpp.
        """
        self._kept = numbers, filters, uniform, stops, tokens, logprobs, drafts
        where = [x for array in self._kept for x in (array.ctypes.data, array.shape[1])]
        self._where = torch.tensor([*where, block])

    def __call__(
        self, at: Integers, logits: Float[Tensor, "M V"], spans: Integers | None = None
    ) -> tuple[Integers, Integers, int]:
        """For the sequences `at` [m] and logits [M, V] → their newest tokens [m]; why each has finished, or 0 [m]; and
        the flags above.

        spans [2, m]: the first row of a sequence's logits and their number: one, and one for every draft token, which
        counts if all drafts before it are accepted; None: one row each.
        """
        m = len(at)
        found = np.empty((2, m + 1), dtype=np.int64)
        cpu.call(
            "append_tokens", logits.dtype, logits.contiguous(), m, logits.shape[1], from_numpy(at),
            None if spans is None else from_numpy(spans), self._where, from_numpy(found),
        )  # fmt: skip
        return found[0, :m], found[1, :m], int(found[1, m])
