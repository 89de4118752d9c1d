"""What DeepEP 2's ElasticBuffer computes, over gloo and slowly: to test that it is called as it must be."""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

buffers = []  # all that were made


@dataclass
class Handle:
    topk_idx: Tensor
    rows: list[tuple[int, int]]  # (rank, token) of each row received
    num_experts: int
    num_sms: int = 6


class ElasticBuffer:
    def __init__(
        self, group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch=False, deterministic=False,
        explicitly_destroy=False,
    ):  # fmt: skip
        assert explicitly_destroy  # else a barrier of all ranks comes with garbage collection
        self.destroyed = False
        self.group, self.tokens, self.hidden, self.fp8 = group, num_max_tokens_per_rank, hidden, use_fp8_dispatch
        self.num_topk = num_topk
        buffers.append(self)

    def destroy(self):
        assert not self.destroyed
        dist.barrier(self.group)  # all ranks must call it, while there is a group
        self.destroyed = True

    def dispatch(self, x, topk_idx=None, topk_weights=None, num_experts=None, num_sms=0, handle=None):
        """Each token once to each rank with one of its experts; rows in order of ranks and tokens."""
        assert not self.destroyed
        assert num_sms == (0 if handle is None else handle.num_sms)  # a cached dispatch has the first one's channels
        assert (handle is None) == (topk_idx is not None)
        assert isinstance(x, tuple) == self.fp8
        parts = x if self.fp8 else (x,)
        assert parts[0].dtype is (torch.float8_e4m3fn if self.fp8 else torch.bfloat16)
        assert not self.fp8 or parts[1].dtype is torch.float32
        assert all(t.is_contiguous() for t in parts)
        assert parts[0].shape[1] == self.hidden
        assert len(parts[0]) <= self.tokens
        chosen = topk_idx if handle is None else handle.topk_idx
        assert chosen.shape[1] == self.num_topk
        experts = num_experts if handle is None else handle.num_experts
        own = experts // self.group.size()
        first = own * self.group.rank()
        sent = [t.view(torch.uint8).cpu() if t.element_size() == 1 else t.cpu() for t in parts]
        weights = None if topk_weights is None else topk_weights.cpu()
        assert weights is None or weights.dtype is torch.float32
        everyone = self._gather((sent, chosen.cpu(), weights))
        rows = [
            (rank, token)
            for rank, (_, numbers, _) in enumerate(everyone)
            for token, those in enumerate(numbers.tolist())
            if any(first <= n < first + own for n in those)
        ]
        if handle is not None:
            assert handle.rows == rows
        received = [torch.stack([everyone[rank][0][k][t] for rank, t in rows]) for k in range(len(parts))]
        out = [t.to(p.device).view(p.dtype) for t, p in zip(received, parts, strict=True)]
        result = tuple(out) if self.fp8 else out[0]
        if handle is not None:
            return result, None, None, handle, None
        local = torch.stack([everyone[rank][1][token] for rank, token in rows]) - first
        local[(local < 0) | (local >= own)] = -1
        own_weights = torch.stack([everyone[rank][2][token] for rank, token in rows]).where(local >= 0, 0.0)
        device = parts[0].device
        return result, local.to(device), own_weights.to(device), Handle(topk_idx, rows, experts), None

    def combine(self, x, handle, topk_weights=None):
        """The sums of each token's rows, and of their weights."""
        assert x.dtype is torch.bfloat16
        assert len(x) == len(handle.rows)
        weights = None if topk_weights is None else topk_weights.cpu()
        count, rank = len(handle.topk_idx), self.group.rank()
        out = torch.zeros(count, self.hidden)
        sums = None if weights is None else torch.zeros(count, self.num_topk)
        for rows, values, theirs in self._gather((handle.rows, x.cpu().float(), weights)):
            for (owner, token), value, weight in zip(rows, values, values if theirs is None else theirs, strict=True):
                if owner == rank:
                    out[token] += value
                    if sums is not None:
                        sums[token] += weight
        return out.bfloat16().to(x.device), None if sums is None else sums.to(x.device), None

    def _gather(self, value):
        found = [None] * self.group.size()
        dist.all_gather_object(found, value, self.group)
        return found


def install():
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64
    sys.modules["deep_ep"] = module
