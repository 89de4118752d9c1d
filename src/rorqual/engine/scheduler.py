"""Which sequences are being decoded: finished ones leave the batch at once, waiting ones enter."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.cache import Decode, Prefill, RowCache
from rorqual.engine.sampler import SamplingParams, sample
from rorqual.kernels.linear import any_shape, linear
from rorqual.model import Transformer

PREFILL_TOKENS = 16384  # prompt tokens a pass, so that a long queue does not need the memory of all at once


@dataclass
class Request:
    """One sequence to generate; `index` is its place in the answer."""

    index: int
    prompt: tuple[int, ...]
    max_tokens: int
    uniform: Tensor  # [max_tokens]: one number in [0, 1) a token


@dataclass
class Finished:
    index: int
    tokens: list[int]
    logprobs: list[float]
    stopped: bool  # by a stop token, not by length


class Scheduler:
    """Rows 0…n-1 are running; everything a step needs to know of them lies in tensors, not in Python objects."""

    def __init__(
        self, model: Transformer, requests: list[Request], params: SamplingParams, rows: int,
        stop_ids: Tensor, think_end: int | None,
    ) -> None:  # fmt: skip
        self.model, self.params, self.stop_ids, self.think_end = model, params, stop_ids, think_end
        self.waiting = deque(requests)
        self.rows = min(rows, len(requests))
        weight = model.head_weight
        length = max(len(r.prompt) + r.max_tokens for r in requests)
        self.cache = RowCache(model.config, self.rows, length, weight.dtype, weight.device)
        limit = max(r.max_tokens for r in requests)
        self.n = 0
        self.index = torch.zeros(self.rows, dtype=torch.long)
        self.at = torch.zeros(self.rows, dtype=torch.long)  # place of the next token in the cache
        self.count = torch.zeros(self.rows, dtype=torch.long)  # tokens made
        self.limit = torch.zeros(self.rows, dtype=torch.long)
        self.closed = torch.zeros(self.rows, dtype=torch.bool)  # the thinking has ended
        self.last = torch.zeros(self.rows, dtype=torch.long)
        self.uniform = torch.zeros(self.rows, limit)
        self.tokens = torch.zeros(self.rows, limit, dtype=torch.long)
        self.logprobs = torch.zeros(self.rows, limit)
        self.state = [self.index, self.at, self.count, self.limit, self.closed, self.last]
        self.state += [self.uniform, self.tokens, self.logprobs]

    @property
    def done(self) -> bool:
        return not self.waiting and self.n == 0

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Admit what fits, then make one token in every row; returns the sequences that ended."""
        free = self.rows - self.n
        # Admitting an eighth of the rows at a time keeps prompt passes from interrupting every decode step.
        if self.waiting and (free >= max(1, self.rows // 8) or self.n == 0 or len(self.waiting) <= free):
            finished = self._admit(free)
            if finished or self.n == 0:
                return finished
        return self._decode()

    def _admit(self, free: int) -> list[Finished]:
        prompts: dict[tuple[int, ...], int] = {}
        admitted: list[Request] = []
        longest = 0
        while self.waiting and len(admitted) < free:
            prompt = self.waiting[0].prompt
            longest = max(longest, len(prompt))
            if prompts and prompt not in prompts and (len(prompts) + 1) * longest > PREFILL_TOKENS:
                break
            prompts.setdefault(prompt, len(prompts))
            admitted.append(self.waiting.popleft())
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        prompt_of = torch.tensor([prompts[r.prompt] for r in admitted])
        new = slice(self.n, self.n + len(admitted))
        device = self.model.head_weight.device
        hidden = self.model(tokens.to(device), cache=Prefill(self.cache, self.n, prompt_of.to(device)))
        last = hidden[torch.arange(len(prompts)), lengths - 1].index_select(0, prompt_of.to(device))
        self.index[new] = torch.tensor([r.index for r in admitted])
        self.limit[new] = torch.tensor([r.max_tokens for r in admitted])
        self.at[new] = lengths[prompt_of]
        self.count[new] = 0
        self.closed[new] = False
        for row, r in enumerate(admitted, start=self.n):
            self.uniform[row, : r.max_tokens] = r.uniform
        self.n += len(admitted)
        return self._extend(last, new)

    def _decode(self) -> list[Finished]:
        running, computed = slice(0, self.n), self._batch_size()
        device = self.model.head_weight.device
        at = self.at[:computed].clone()
        at[self.n :] = 0
        at = at.to(device)
        past = Decode(self.cache, at)
        hidden = self.model(self.last[:computed, None].to(device), at.unsqueeze(1), past.mask, past)
        self.at[running] += 1
        return self._extend(hidden[: self.n, 0], running)

    def _batch_size(self) -> int:
        """Rows to compute: those that run and, where a new shape costs something, idle ones up to one of eight sizes an
        octave: a batch that shrinks by one sequence at a time has as many shapes as sequences.
        """
        # Latent attention has products of its own, between linears and cache.
        if not self.model.config.is_mla and any_shape(self.model.head_weight, self.n):
            return self.n
        step = 1 << max(0, self.n.bit_length() - 4)
        return min(self.rows, -(-self.n // step) * step)

    def _extend(self, hidden: Tensor, rows: slice) -> list[Finished]:
        """Sample a token for `rows` from their last hidden states [n, D], record it, release what ended."""
        logits = linear(hidden, self.model.head_weight)
        count = self.count[rows]
        made = torch.arange(rows.start, rows.stop)
        tokens, logprobs = (t.cpu() for t in sample(logits, self.params, self.uniform[made, count]))
        if self.params.thinking_budget is not None:
            forced = ~self.closed[rows] & (count >= self.params.thinking_budget)
            tokens[forced] = self.think_end
            self.closed[rows] |= tokens == self.think_end
        self.tokens[made, count] = tokens
        self.logprobs[made, count] = logprobs
        self.last[rows] = tokens
        self.count[rows] += 1
        stopped = torch.isin(tokens, self.stop_ids)
        ended = stopped | (self.count[rows] >= self.limit[rows])
        return self._release(made[ended], stopped[ended]) if ended.any() else []

    def _release(self, ended: Tensor, stopped: Tensor) -> list[Finished]:
        finished = [
            Finished(int(self.index[row]), self.tokens[row, :n].tolist(), self.logprobs[row, :n].tolist(), stop)
            for row, n, stop in zip(ended.tolist(), self.count[ended].tolist(), stopped.tolist(), strict=True)
        ]
        alive = torch.ones(self.n, dtype=torch.bool)
        alive[ended] = False
        left = self.n - len(finished)
        holes = (~alive[:left]).nonzero().flatten()
        if len(holes):  # the last rows move into the holes
            movers = left + alive[left:].nonzero().flatten()
            for state in self.state:
                state[holes] = state[movers]
            device = self.model.head_weight.device
            self.cache.move(movers.to(device), holes.to(device), int(self.at[movers].max()))
        self.n = left
        return finished
