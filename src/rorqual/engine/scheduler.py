"""Continuous batching (Yu et al. 2022, Orca): a step decodes every running sequence and prefills waiting prompts.

Prefill is chunked: at most `max_prefill_tokens` prompt tokens a step. Finished sequences leave at once. When the KV
cache is full, the most recent arrival is preempted: its blocks are freed, and its prompt and generated tokens are
prefilled again later.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, from_numpy

from rorqual.engine.batch import DecodeBatch, Integers, Request, Sequence
from rorqual.engine.block_manager import BLOCK, BlockManager, block_key
from rorqual.engine.model_runner import DecodeTokens, ModelRunner, PrefillChunk
from rorqual.engine.paged_kv_cache import PagedKVCache
from rorqual.engine.sampling import SamplingStep
from rorqual.engine.speculative import MAX_MTP_SEQS, MTPDrafter, SpeculativeMethod, propose_lookup, trim_drafts
from rorqual.kernels.append_tokens import STOP_TOKEN
from rorqual.model import Transformer


@dataclass(eq=False)
class PrefillJob:
    """Tokens to prefill, and the sequences that decode from there."""

    request: Request
    tokens: tuple[int, ...]  # the prompt; for a preempted sequence also its generated tokens
    sequences: list[Sequence]
    num_computed: int = 0  # tokens in the KV cache
    blocks: list[int] = field(default_factory=list)
    # Of the last token, [1, V] and [1, D], set when the prefill is complete.
    logits: Tensor | None = None
    state: Tensor | None = None

    def next_chunk(self, length: int) -> PrefillChunk:
        """The next `length` tokens."""
        end = self.num_computed + length
        tokens = torch.tensor(self.tokens[self.num_computed : end + 1])
        return PrefillChunk(tokens[:length], tokens[1:], self.num_computed, self.blocks)


@dataclass
class Counters:
    """Totals since the scheduler was made."""

    prompt_tokens: int = 0  # prefilled
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # verified
    accepted_tokens: int = 0


class Scheduler:
    """Decodes at most `max_num_seqs` sequences and prefills at most `max_prefill_tokens` tokens a step.

    prefix_cache: keep full blocks for prompts with the same prefix. speculative: where draft tokens come from.
    """

    def __init__(
        self, model: Transformer, max_num_seqs: int, kv_cache: PagedKVCache, blocks: BlockManager, prefix_cache: bool,
        max_prefill_tokens: int, speculative: SpeculativeMethod | None = None,
    ) -> None:  # fmt: skip
        self.model, self.kv_cache, self.blocks = model, kv_cache, blocks
        self.prefix_cache, self.max_prefill_tokens = prefix_cache, max_prefill_tokens
        self.waiting: deque[PrefillJob] = deque()
        self.prefilling: list[PrefillJob] = []  # oldest first
        self.ready: deque[PrefillJob] = deque()  # prefilled; their sequences wait for rows of the batch
        self.batch = DecodeBatch(max_num_seqs)
        self.model_runner = ModelRunner(model, kv_cache)
        self.mtp_drafter = MTPDrafter(model, kv_cache) if speculative == "mtp" else None
        self.speculative = speculative
        self.counters = Counters()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.ready or self.batch.n)

    @property
    def num_waiting(self) -> int:
        return sum(len(job.sequences) for job in (*self.waiting, *self.prefilling, *self.ready))

    def add(self, request: Request) -> None:
        self.waiting.append(PrefillJob(request, request.prompt, list(request.sequences)))

    @torch.inference_mode()
    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        """One step → the sequences that finished, and those of streaming requests."""
        self._admit()
        jobs = self._schedule_prefill()
        chunks = [job.next_chunk(length) for job, length in jobs]
        decode, tokens_per_row = self._decode_tokens()
        if before_forward:
            before_forward()
        logits, states, prefill_states = self.model_runner(decode, chunks)
        prefilled = self._finish_prefill(jobs, chunks, prefill_states, logits[len(decode) :]) if chunks else []
        started = self._start_decode()
        batch, n = self.batch, self.batch.n - len(started)
        if batch.n == 0:
            return []
        if started != prefilled:  # copying a batch's logits takes a while
            logits = torch.cat([logits[: len(decode)], *(job.logits for job in started)])
        if tokens_per_row is not None and started:
            tokens_per_row = np.concatenate([tokens_per_row, np.ones(len(started), dtype=np.int64)])
        sampling_step = SamplingStep(batch, logits, tokens_per_row)
        if self.mtp_drafter is not None:
            sampling_step.states = torch.cat([states, *(job.state for job in started)])
            sampling_step.positions = np.concatenate([decode.positions.numpy(), batch.position[n : batch.n]])
        sampling_step.sample()
        self.counters.generated_tokens += sampling_step.num_sampled
        self.counters.accepted_tokens += sampling_step.num_sampled - batch.n
        return self._finish_decode(sampling_step)

    def _decode_tokens(self) -> tuple[DecodeTokens, Integers | None]:
        """Every row's newest token and the draft tokens after it; and their number a row, None where it is 1."""
        batch, n = self.batch, self.batch.n
        last, tables, drafts = batch.last_token[:n], batch.block_tables[:n], batch.drafts[:n]
        position = batch.position[:n]
        if self.speculative is None or not (drafts >= 0).any():
            ones = None if self.mtp_drafter is None else np.ones(n, dtype=np.int64)
            return DecodeTokens(from_numpy(last), from_numpy(position), from_numpy(tables)), ones
        kept = trim_drafts(batch, self.blocks)
        tables = batch.block_tables[:n]  # trim_drafts may have widened it
        self.counters.draft_tokens += int(kept.sum())
        tokens = np.concatenate([last[:, None], drafts], axis=1)
        used = np.concatenate([np.ones((n, 1), dtype=bool), kept], axis=1)
        positions = position[:, None] + np.arange(tokens.shape[1])
        tokens_per_row = used.sum(1)
        parts = tokens[used], positions[used], tables.repeat(tokens_per_row, 0)
        return DecodeTokens(*(from_numpy(part) for part in parts)), tokens_per_row

    def cancel(self, request: Request) -> None:
        """Stop a request's sequences, waiting or running; their blocks are free at once."""
        for row, running in reversed(list(enumerate(self.batch.sequences))):
            if running.request is request:
                self.finish(row, "cancelled")
        for queue in (self.waiting, self.prefilling, self.ready):
            for job in [j for j in queue if j.request is request]:
                queue.remove(job)
                self.blocks.free_blocks(job.blocks)
        for sequence in request.sequences:
            sequence.finish_reason = sequence.finish_reason or "cancelled"

    def finish(self, row: int, reason: str) -> Sequence:
        """Finish a row's sequence and remove it from the batch."""
        sequence = self.batch.save(row)
        sequence.finish_reason, sequence.drafter = reason, None
        self._release_blocks(sequence)
        self.batch.remove([row])
        return sequence

    # -- admission, prefill and blocks

    def _admit(self) -> None:
        if not self.waiting:
            return
        busy = self.batch.n + sum(len(j.sequences) for j in (*self.prefilling, *self.ready))
        free = self.batch.size - busy
        # Admitting an eighth of the rows at a time keeps prefill from slowing every decode step.
        if busy and free < max(1, self.batch.size // 8) and len(self.waiting) > free:
            return
        promised = sum(-(-len(j.tokens) // BLOCK) - len(j.blocks) for j in self.prefilling) + self.batch.n // BLOCK
        while self.waiting and free > 0:
            job = self.waiting[0]
            promised += -(-len(job.tokens) // BLOCK) + 1
            if free < self.batch.size and promised > self.blocks.free:
                return
            self.waiting.popleft()
            if self.prefix_cache and job.request.prompt_logprobs is None:  # logprobs need every token's hidden state
                self._match_prefix(job)
            self.prefilling.append(job)
            free -= len(job.sequences)

    def _match_prefix(self, job: PrefillJob) -> None:
        """Start a job from its longest prefix in the prefix cache; the last token is always computed."""
        key = b""
        for start in range(0, len(job.tokens) - BLOCK, BLOCK):
            key = block_key(key, job.tokens[start : start + BLOCK])
            block = self.blocks.lookup(key)
            if block is None:
                break
            self.blocks.incref(block)
            job.blocks.append(block)
        job.num_computed = len(job.blocks) * BLOCK
        self.counters.cached_tokens += job.num_computed
        if job.tokens is job.request.prompt:
            job.request.cached_tokens = job.num_computed

    def _schedule_prefill(self) -> list[tuple[PrefillJob, int]]:
        """Allocate blocks for the next token of every row, then for chunks of prompts → jobs and chunk lengths."""
        batch = self.batch
        lacking = (
            (batch.position[: batch.n] >= batch.num_blocks[: batch.n] * BLOCK).nonzero()[0].tolist()
            if batch.needs_blocks
            else []
        )
        if len(lacking) <= self.blocks.free:
            if lacking:
                batch.add_blocks(lacking, [self.blocks.allocate() for _ in lacking])
            batch.needs_blocks = False
        else:
            for sequence in [batch.sequences[row] for row in lacking]:  # oldest first: the newest are preempted
                block = self._allocate_or_preempt(sequence) if sequence in batch.sequences else None
                if block is not None:
                    batch.add_blocks([batch.sequences.index(sequence)], [block])
        chosen, left = [], self.max_prefill_tokens
        for job in self.prefilling:
            length = min(left, len(job.tokens) - job.num_computed)
            while len(job.blocks) * BLOCK < job.num_computed + length:
                block = self.blocks.allocate()
                if block is None and not batch.n and not chosen:
                    block = self._allocate_or_preempt(job)
                if block is None:
                    break
                job.blocks.append(block)
            length = min(length, len(job.blocks) * BLOCK - job.num_computed)
            if length <= 0:
                break
            chosen.append((job, length))
            left -= length
            if left == 0:
                break
        return chosen

    def _allocate_or_preempt(self, target: Sequence | PrefillJob) -> int | None:
        """A block for `target`, preempting the most recent arrivals if none is free; None if that is `target`."""
        while (block := self.blocks.allocate()) is None:
            victim: Sequence | PrefillJob
            if self.ready:
                victim = self.ready.pop()
            elif self.prefilling and self.prefilling[-1] is not target:
                victim = self.prefilling.pop()
            else:
                victim = self.batch.sequences[-1]
            self.counters.preemptions += 1
            if isinstance(victim, PrefillJob):
                self.blocks.free_blocks(victim.blocks)
                self.waiting.appendleft(PrefillJob(victim.request, victim.tokens, victim.sequences))
                continue
            saved = self.batch.save(self.batch.n - 1)
            self.batch.remove([self.batch.n - 1])
            self._release_blocks(saved)
            self.waiting.appendleft(PrefillJob(saved.request, saved.request.prompt + tuple(saved.tokens), [saved]))
            if saved is target:
                return None
        return block

    def _release_blocks(self, sequence: Sequence) -> None:
        if self.prefix_cache:
            # The newest token is not in the KV cache yet.
            self._cache_blocks((sequence.request.prompt + tuple(sequence.tokens))[:-1], sequence.blocks)
        self.blocks.free_blocks(sequence.blocks)
        sequence.blocks = []

    def _cache_blocks(self, tokens: tuple[int, ...], blocks: list[int]) -> None:
        key = b""
        for block, start in zip(blocks, range(0, len(tokens) - BLOCK + 1, BLOCK), strict=False):
            key = block_key(key, tokens[start : start + BLOCK])
            self.blocks.insert(block, key)

    def _finish_prefill(
        self, jobs: list[tuple[PrefillJob, int]], chunks: list[PrefillChunk], states: Tensor, logits: Tensor
    ) -> list[PrefillJob]:
        """Record chunks as computed → the jobs whose prefill is complete.

        states [M, D]: hidden states of all the chunks' tokens; logits [E, V]: of the last tokens of the E prompts that
        end here.
        """
        if self.mtp_drafter is not None:
            self.mtp_drafter.prefill(chunks, states)
        self.counters.prompt_tokens += len(states)
        prefilled: list[PrefillJob] = []
        for (job, length), part in zip(jobs, states.split([length for _, length in jobs]), strict=True):
            if job.request.prompt_logprobs is not None:
                job.request.prompt_logprobs.append(part, job.num_computed)
            job.num_computed += length
            if self.prefix_cache:
                self._cache_blocks(job.tokens[: job.num_computed], job.blocks)
            if job.num_computed == len(job.tokens):
                e = len(prefilled)
                job.logits, job.state = logits[e : e + 1].clone(), part[-1:].clone()
                prefilled.append(job)
                self.prefilling.remove(job)
                if job.sequences:
                    self.ready.append(job)
                else:
                    self.blocks.free_blocks(job.blocks)
        return prefilled

    # -- decode

    def _start_decode(self) -> list[PrefillJob]:
        """Give free rows to sequences whose prompt is prefilled → the job of each.

        A prompt's sequences share its full blocks; each but the last copies the block that is not full.
        """
        jobs, sources, targets = [], [], []
        while self.ready and self.batch.n < self.batch.size:
            job = self.ready[0]
            full = len(job.tokens) // BLOCK
            partly = len(job.blocks) > full
            last = len(job.sequences) == 1
            if partly and not last:
                copy = self.blocks.allocate()
                if copy is None:
                    if self.batch.n == 0:  # nothing runs that could free a block
                        self._requeue_all_but_first(job)
                        continue
                    break
                sources.append(job.blocks[full])
                targets.append(copy)
                blocks = [*job.blocks[:full], copy]
            else:
                blocks = list(job.blocks)
            if not last:
                for block in job.blocks[:full]:
                    self.blocks.incref(block)
            sequence = job.sequences.pop(0)
            sequence.blocks = blocks
            self.batch.add(sequence, len(job.tokens) - 1)
            jobs.append(job)
            if last:
                self.ready.popleft()
        if sources:
            self.kv_cache.copy(sources, targets)
        return jobs

    def _requeue_all_but_first(self, job: PrefillJob) -> None:
        """Put all but the first of a job's sequences back into the waiting queue."""
        for sequence in reversed(job.sequences[1:]):
            self.waiting.appendleft(PrefillJob(job.request, job.tokens, [sequence]))
        job.sequences = job.sequences[:1]

    def _finish_decode(self, sampling_step: SamplingStep) -> list[Sequence]:
        """Remove finished sequences, and propose drafts for the others → those finished, and those that stream."""
        batch, finished = self.batch, sampling_step.finished
        streaming = batch.streaming[: batch.n].nonzero()[0].tolist() if batch.any_streaming else []
        grown = [batch.sequences[row] for row in streaming if row not in finished]
        if self.speculative == "ngram" or (self.mtp_drafter is not None and batch.n <= MAX_MTP_SEQS):
            self._propose_drafts(sampling_step)
        ended = []
        for row, reason in finished.items():
            sequence = batch.save(row)
            sequence.finish_reason, sequence.drafter = "stop" if reason == STOP_TOKEN else "length", None
            self._release_blocks(sequence)
            ended.append(sequence)
        if finished:
            batch.remove(list(finished))
        return ended + grown

    def _propose_drafts(self, sampling_step: SamplingStep) -> None:
        """Requests with stop strings get no drafts: a stop string is found in the text only after the step."""
        drafting = [
            row not in sampling_step.finished and not sequence.request.params.stop
            for row, sequence in enumerate(self.batch.sequences)
        ]
        if not any(drafting):
            return
        which = np.array(drafting)
        if self.mtp_drafter is None:
            propose_lookup(self.batch, which.nonzero()[0])
        else:
            self.mtp_drafter.propose(self.batch, which.nonzero()[0], *sampling_step.accepted(which))
