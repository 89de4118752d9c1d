"""One forward pass over the tokens of a step: decode tokens of running sequences and prefill chunks of prompts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.adapters.served import Name, ServedAdapters
from rorqual.engine.cuda_graphs import CUDAGraphRunner, can_capture
from rorqual.engine.fused_cpu import fused_decode_step
from rorqual.engine.paged_kv_cache import KVCacheView, PagedKVCache, PrefillSlice
from rorqual.kernels.linear import shapes_are_free
from rorqual.model import Transformer
from rorqual.model.moe import MixtureOfExperts
from rorqual.model.router_hooks import choices_of
from rorqual.parallel.experts import shares_experts

# Tokens a call of the fused step: with more, the activations between layers outgrow the CPU's cache (3 % with prompts
# of 512).
MAX_FUSED_TOKENS = 192
ROW_BLOCK = 24  # of the compiled quantised products (cpu/csrc/quantized_weight.h)


@dataclass
class DecodeTokens:
    """N tokens to decode, each with its position and its sequence's block table.

    A sequence's tokens, if there are several, are adjacent and in order: its newest token, then draft tokens.
    """

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    block_tables: Tensor  # int32 [N, ·]
    adapters: list[Name] | None = None  # of each; None: the model serves none

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def padded(self, size: int) -> "DecodeTokens":
        """With padding up to `size`, which reads and writes the null block."""
        more = size - len(self)
        if more == 0:
            return self
        tokens, positions = (torch.cat([x, x.new_zeros(more)]) for x in (self.tokens, self.positions))
        tables = torch.cat([self.block_tables, self.block_tables.new_zeros(more, self.block_tables.shape[1])])
        return DecodeTokens(tokens, positions, tables, self.adapters and self.adapters + self.adapters[-1:] * more)

    def of(self, name: Name) -> tuple[Tensor, "DecodeTokens"]:
        """The rows of an adapter, and their tokens."""
        rows = torch.tensor([i for i, other in enumerate(self.adapters or []) if other == name], dtype=torch.long)
        tokens, positions, tables = (t[rows] for t in (self.tokens, self.positions, self.block_tables))
        return rows, DecodeTokens(tokens, positions, tables, [name] * len(rows))


@dataclass
class PrefillChunk:
    """Tokens of a prompt to prefill, the first at position `start`; `blocks` hold them and all before them.

    following: the token after each; the prompt's last token has none.
    """

    tokens: Tensor
    following: Tensor
    start: int
    blocks: list[int]
    adapter: Name = None

    @property
    def ends(self) -> bool:
        """Whether it completes the prompt."""
        return len(self.following) < len(self.tokens)


class ModelRunner:
    """Runs the model: by fused CPU steps where weights are quantised, by CUDA graphs where a step can be captured.

    With fused steps a token's result does not depend on the batch composition (cpu/csrc/fused_decode.cpp). Where
    processes share the experts, each call is a collective: also one without tokens passes through the experts.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache, adapters: ServedAdapters | None = None) -> None:
        self.model, self.cache, self.adapters = model, cache, adapters
        self.fused = fused_decode_step(model, cache)
        # A captured step runs no hooks, by which routing is recorded, and the adapters of one batch.
        captures = can_capture(model) and cache.choices is None and adapters is None
        self.graphs = CUDAGraphRunner(model, cache) if captures else None
        self.collective = shares_experts(model)

    def __call__(self, decode: DecodeTokens, chunks: list[PrefillChunk]) -> tuple[Tensor, Tensor, Tensor]:
        """→ logits [N + E, V] of the N decode tokens and of the last tokens of the E prompts that these chunks
        complete; hidden states [N, D] of decode; hidden states [M, D] of the chunks' tokens, concatenated.
        """
        n = len(decode)
        if self.graphs is not None and n and not chunks:
            logits, states = self.graphs(*self._inputs(decode.padded(self.graphs.size(n)), []))
            return logits[:n], states[:n], states[:0]
        if self.fused is None:
            padded = decode.padded(self._padded_size(n))
            states = self._run_model(padded, chunks) if self.adapters is None else self._run_adapted(padded, chunks)
            num_prefill = sum(len(chunk.tokens) for chunk in chunks)
            states, prefill_states = states[:n], states[len(states) - num_prefill :]
            sampled = torch.cat([states, prefill_states[_last_tokens(chunks)]]) if chunks else states
            logits = self.model.head(sampled) if len(sampled) else sampled
            return logits, states, prefill_states
        if not chunks:
            logits, states = self._run_fused(decode)
            return logits, states, states[n:]
        ends = _last_tokens(chunks)
        # Latent attention prefills in its expanded form, which is less work for many tokens of a sequence.
        if self.model.config.is_mla:
            logits, states = self._run_fused(decode)
            prefill_states = self._run_model(_empty(decode), chunks)
            if len(ends):
                more = self.model.head(prefill_states[ends]).float()
                logits = torch.cat([logits, more]) if n else more
            return logits, states, prefill_states
        logit_rows = torch.cat([torch.arange(n), n + ends]).to(torch.int32)
        logits, states = self._run_fused(_concatenate(decode, chunks), logit_rows)
        return logits, states[:n], states[n:]

    def _run_fused(self, decode: DecodeTokens, logit_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the tokens `logit_rows` (ascending), None: of all; hidden states of all."""
        assert self.fused is not None
        if not len(decode):
            return torch.empty(0), torch.empty(0)
        lengths = torch.from_numpy((decode.positions.numpy() + 1).astype(np.int32))  # NumPy takes a third of the time
        if len(decode) <= MAX_FUSED_TOKENS:
            return self.fused(decode.tokens, decode.block_tables, lengths, logit_rows)
        # Calls of even size: a small last one would read all the weights for a few tokens.
        calls = -(-len(decode) // MAX_FUSED_TOKENS)
        size = -(-len(decode) // (calls * ROW_BLOCK)) * ROW_BLOCK
        parts = []
        for first in range(0, len(decode), size):
            some = slice(first, first + size)
            here = (
                None if logit_rows is None else logit_rows[(logit_rows >= first) & (logit_rows < first + size)] - first
            )
            parts.append(self.fused(decode.tokens[some], decode.block_tables[some], lengths[some], here))
        logits, states = (torch.cat(x) for x in zip(*parts, strict=True))
        return logits, states

    def _run_model(self, decode: DecodeTokens, chunks: list[PrefillChunk]) -> Tensor:
        if not len(decode) and not chunks:
            if self.collective:
                self._serve_others()
            return torch.empty(0)
        tokens, view = self._inputs(decode, chunks)
        if self.cache.choices is None:
            return self.model(tokens, view.positions, cache=view)[0]
        with choices_of(self.model) as chosen:
            states = self.model(tokens, view.positions, cache=view)[0]
        self.cache.choices.flatten(0, 1)[view.slot_mapping] = torch.stack(chosen, 1).to(torch.int16)
        return states

    def _run_adapted(self, decode: DecodeTokens, chunks: list[PrefillChunk]) -> Tensor:
        """`_run_model` in passes: one for all decode tokens, where the adapters allow it, and one for each adapter
        among the chunks. A batch of one adapter is one pass.
        """
        assert self.adapters is not None
        names = set(decode.adapters or []) | {chunk.adapter for chunk in chunks}
        if len(names) == 1:
            with self.adapters.applied(list(names)):
                return self._run_model(decode, chunks)
        parts: dict[int, Tensor] = {}  # hidden states by place: decode tokens, then a chunk each
        none = _empty(decode)
        if len(decode) and self.adapters.by_rows:
            with self.adapters.applied(decode.adapters or []):
                parts[-1] = self._run_model(decode, [])
        elif len(decode):
            weight = self.model.head_weight
            found = torch.empty(len(decode), self.model.config.hidden_size, dtype=weight.dtype, device=weight.device)
            for name in sorted(set(decode.adapters or []), key=str):
                rows, own = decode.of(name)
                with self.adapters.applied([name]):
                    found[rows.to(found.device)] = self._run_model(own, [])
            parts[-1] = found
        for name in sorted({chunk.adapter for chunk in chunks}, key=str):
            at = [i for i, chunk in enumerate(chunks) if chunk.adapter == name]
            with self.adapters.applied([name]):
                states = self._run_model(none, [chunks[i] for i in at])
            parts |= dict(zip(at, states.split([len(chunks[i].tokens) for i in at]), strict=True))
        return torch.cat([parts[i] for i in sorted(parts)])

    def _serve_others(self) -> None:
        """Compute what other processes' tokens need of the experts here, without tokens of one's own."""
        weight = self.model.head_weight
        none = torch.empty(1, 0, self.model.config.hidden_size, dtype=weight.dtype, device=weight.device)
        for layer in self.model.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp(none)

    def _inputs(self, decode: DecodeTokens, chunks: list[PrefillChunk]) -> tuple[Tensor, KVCacheView]:
        """Their tokens [1, N], and the KV cache's view of them."""
        view = KVCacheView(
            self.cache,
            decode.block_tables,
            decode.positions,
            [PrefillSlice(p.start, len(p.tokens), p.blocks) for p in chunks],
        )
        return torch.cat([decode.tokens, *(p.tokens for p in chunks)]).unsqueeze(0).to(view.slot_mapping.device), view

    def _padded_size(self, n: int) -> int:
        """Decode tokens to compute: n, padded to one of eight sizes an octave where a new shape costs time, since a
        batch that shrinks by one sequence at a time has as many shapes as sequences.
        """
        # Latent attention has matrix products of its own, which new shapes slow down too. Shared experts count tokens.
        if n == 0 or self.collective or (not self.model.config.is_mla and shapes_are_free(self.model.head_weight, n)):
            return n
        step = 1 << max(0, n.bit_length() - 4)
        return -(-n // step) * step


def _last_tokens(chunks: list[PrefillChunk]) -> Tensor:
    """Indices, among all tokens of the chunks, of those that complete a prompt."""
    lengths = torch.tensor([len(p.tokens) for p in chunks])
    return (lengths.cumsum(0) - 1)[torch.tensor([p.ends for p in chunks], dtype=torch.bool)]


def _empty(decode: DecodeTokens) -> DecodeTokens:
    return DecodeTokens(decode.tokens[:0], decode.positions[:0], decode.block_tables[:0], decode.adapters and [])


def _concatenate(decode: DecodeTokens, chunks: list[PrefillChunk]) -> DecodeTokens:
    """Prefill chunks as decode tokens: a prompt's tokens are several of one sequence."""
    if not chunks:
        return decode
    width = max(decode.block_tables.shape[1], *(len(p.blocks) for p in chunks))
    tables = [F.pad(decode.block_tables, (0, width - decode.block_tables.shape[1]))]
    for p in chunks:
        table = torch.tensor(p.blocks, dtype=torch.int32)
        tables.append(F.pad(table, (0, width - len(table))).expand(len(p.tokens), width))
    positions = [torch.arange(p.start, p.start + len(p.tokens)) for p in chunks]
    tokens = torch.cat([decode.tokens, *(p.tokens for p in chunks)])
    return DecodeTokens(tokens, torch.cat([decode.positions, *positions]), torch.cat(tables))
