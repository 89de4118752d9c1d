"""Decode steps on a GPU as CUDA graphs, captured once and replayed.

A step of a small network is hundreds of kernels of microseconds each, and launching them one by one takes the CPU much
longer; a graph is launched as a whole. It works on the same memory each time, so there is one for every number of
tokens and of blocks a table, both rounded up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.model import Transformer
from rorqual.parallel.experts import shares_experts

MIN_BLOCKS = 16  # blocks a table in the smallest graphs
LINEAR_FROM = 64  # tokens from which sizes are multiples of it, instead of powers of two
MAX_TABLE_ENTRIES = 1 << 15  # tokens × blocks of a graph; it keeps the memory that it needs


def can_capture(model: Transformer) -> bool:
    """Whether a step can be captured: it must not synchronise with the CPU.

    PyTorch's grouped matmul does, to read each expert's number of rows, except for BF16 on GPUs of compute capability 9
    and 10; so does the product of experts whose weights stay in FP8, and a token's way to experts of other processes.
    """
    weight, config = model.head_weight, model.config
    if not isinstance(weight, Tensor) or not weight.is_cuda:
        return False
    if config.n_routed_experts is None:
        return True
    if shares_experts(model) or any(isinstance(layer.experts.gate_up_proj, FP8Weight) for layer in model.moe_layers()):
        return False
    fits = config.hidden_size % 8 == config.moe.moe_intermediate_size % 8 == 0
    return fits and weight.dtype is torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


@dataclass
class CapturedGraph:
    """A graph, its inputs and its outputs; the next replay overwrites the outputs."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    view: KVCacheView
    logits: Tensor
    states: Tensor


class CUDAGraphRunner:
    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        frequencies, factor = model.rope
        model.rope = frequencies.to(model.head_weight.device), factor  # no copy to the device during capture
        self.stream = torch.cuda.Stream(model.head_weight.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple[int, int], CapturedGraph] = {}

    def __call__(self, tokens: Tensor, view: KVCacheView) -> tuple[Tensor, Tensor]:
        """tokens [1, N], N a `size`, all of decode → logits [N, V] and hidden states [N, D]."""
        blocks = view.block_tables.shape[1]
        padded = max(MIN_BLOCKS, 1 << (blocks - 1).bit_length())
        key = tokens.shape[1], padded
        if tokens.shape[1] * padded > MAX_TABLE_ENTRIES:
            return self._compute(tokens, view)
        view.block_tables = F.pad(view.block_tables, (0, padded - blocks))
        found = self.captured.get(key)
        if found is None:
            found = self.captured[key] = self._capture(tokens, view)
        else:
            found.tokens.copy_(tokens)
            for name in ("slot_mapping", "positions", "block_tables", "lengths"):
                getattr(found.view, name).copy_(getattr(view, name))
        found.graph.replay()
        return found.logits, found.states

    def _capture(self, tokens: Tensor, view: KVCacheView) -> CapturedGraph:
        with torch.cuda.device(tokens.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # warm-up: libraries allocate their workspaces
                self._compute(tokens, view)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                logits, states = self._compute(tokens, view)
        return CapturedGraph(graph, tokens, view, logits, states)

    def _compute(self, tokens: Tensor, view: KVCacheView) -> tuple[Tensor, Tensor]:
        states = self.model(tokens, view.positions, cache=view)[0]
        return self.model.head(states), states

    @staticmethod
    def size(n: int) -> int:
        """The number of tokens of the smallest graph that holds n."""
        return 1 << (n - 1).bit_length() if n < LINEAR_FROM else -(-n // LINEAR_FROM) * LINEAR_FROM
