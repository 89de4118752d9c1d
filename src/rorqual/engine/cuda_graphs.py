"""Decode steps on a GPU, recorded once and played back.

A step of a small network is hundreds of kernels that each run for microseconds, and the processor takes much longer to
start them one by one; a recorded step (a CUDA graph) is started as a whole. It does the same to the same memory each
time, so there is one for every number of lanes and of blocks to look at, both rounded up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache
from rorqual.kernels.linear import linear
from rorqual.model import Transformer

SPAN = 16  # blocks that the smallest recordings look at
EVENLY = 64  # lanes from which sizes are multiples of it, instead of powers of two
MOST = 1 << 15  # blocks that all lanes of a recording look at, since what it needs of memory it keeps


def can_capture(model: Transformer) -> bool:
    """Whether a step waits for nothing on the way. PyTorch's products of experts do, to know how many rows each has,
    but for BF16 on GPUs of compute capability 9 and 10.
    """
    weight, config = model.head_weight, model.config
    if not isinstance(weight, Tensor) or not weight.is_cuda:
        return False
    if config.n_routed_experts is None:
        return True
    fits = config.hidden_size % 8 == config.moe_intermediate_size % 8 == 0
    return fits and weight.dtype is torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


@dataclass
class CapturedGraph:
    """What a graph reads and leaves; the next that is played overwrites the latter."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    step: KVCacheView
    logits: Tensor
    states: Tensor


class CUDAGraphRunner:
    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        frequencies, factor = model.rope
        model.rope = frequencies.to(model.head_weight.device), factor  # nothing may be brought there meanwhile
        self.aside = torch.cuda.Stream(model.head_weight.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple[int, int], CapturedGraph] = {}

    def __call__(self, tokens: Tensor, step: KVCacheView) -> tuple[Tensor, Tensor]:
        """Of tokens [1, N], N a `size`, and the step that they are all of → logits [N, V] and states [N, D]."""
        blocks = step.row_tables.shape[1]
        span = max(SPAN, 1 << (blocks - 1).bit_length())
        key = tokens.shape[1], span
        if tokens.shape[1] * span > MOST:
            return self._compute(tokens, step)
        step.row_tables = F.pad(step.row_tables, (0, span - blocks))
        found = self.recordings.get(key)
        if found is None:
            found = self.recordings[key] = self._record(tokens, step)
        else:
            found.tokens.copy_(tokens)
            for name in ("index", "positions", "row_tables", "lengths"):
                getattr(found.step, name).copy_(getattr(step, name))
        found.graph.replay()
        return found.logits, found.states

    def _record(self, tokens: Tensor, step: KVCacheView) -> CapturedGraph:
        with torch.cuda.device(tokens.device):
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):  # libraries make ready what they need
                self._compute(tokens, step)
            torch.cuda.current_stream().wait_stream(self.aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.aside):
                logits, states = self._compute(tokens, step)
        return CapturedGraph(graph, tokens, step, logits, states)

    def _compute(self, tokens: Tensor, step: KVCacheView) -> tuple[Tensor, Tensor]:
        states = self.model(tokens, step.positions, cache=step)[0]
        return linear(states, self.model.head_weight), states

    @staticmethod
    def size(lanes: int) -> int:
        """Lanes that a recording has which so many fit in."""
        return 1 << (lanes - 1).bit_length() if lanes < EVENLY else -(-lanes // EVENLY) * EVENLY
