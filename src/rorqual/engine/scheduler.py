"""What runs in the next step: a token of every running sequence, and as much of waiting prompts as a step may hold.

Finished sequences leave at once, waiting ones enter (Yu et al. 2022, Orca). When the cache is full, what came last
gives its blocks back and is computed again later; nothing that was made is lost.
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
from rorqual.engine.speculative import MOST, MTPDrafter, Way, propose_lookup, trim_drafts
from rorqual.kernels.append_tokens import STOP_TOKEN
from rorqual.model import Transformer


@dataclass(eq=False)
class PrefillJob:
    """Tokens to bring into the cache, and the samples that go on from there."""

    request: Request
    tokens: tuple[int, ...]  # the prompt, and what a sample that gave its blocks back had made
    sequences: list[Sequence]
    num_computed: int = 0  # tokens in the cache
    blocks: list[int] = field(default_factory=list)
    # Of the last token, [1, V] and [1, D], when all are.
    logits: Tensor | None = None
    state: Tensor | None = None

    def next_chunk(self, length: int) -> PrefillChunk:
        """The next so many tokens."""
        end = self.num_computed + length
        tokens = torch.tensor(self.tokens[self.num_computed : end + 1])
        return PrefillChunk(tokens[:length], tokens[1:], self.num_computed, self.blocks)


@dataclass
class Counters:
    """What has happened since the beginning."""

    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # found in the cache
    generated_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # guesses at tokens that were checked
    accepted_tokens: int = 0  # and right


class Scheduler:
    """`slots` sequences at most, in the blocks of one cache; `chunk` prompt tokens a step at most."""

    def __init__(
        self, model: Transformer, max_num_seqs: int, kv_cache: PagedKVCache, blocks: BlockManager, prefix_cache: bool,
        max_prefill_tokens: int, speculative: Way | None = None,
    ) -> None:  # fmt: skip
        """keep: remember full blocks for prompts that begin the same way. speculative: where drafts come from."""
        self.model, self.kv_cache, self.blocks, self.prefix_cache, self.max_prefill_tokens = (
            model,
            kv_cache,
            blocks,
            prefix_cache,
            max_prefill_tokens,
        )
        self.waiting: deque[PrefillJob] = deque()
        self.prefilling: list[PrefillJob] = []  # partly in the cache, oldest first
        self.ready: deque[PrefillJob] = deque()  # wholly in it; their samples wait for rows
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
    def step(self, begins: Callable[[], None] | None = None) -> list[Sequence]:
        """One step; returns the samples that ended, and those whose request is watched."""
        self._admit()
        jobs = self._schedule_prefill()
        chunks = [job.next_chunk(length) for job, length in jobs]
        decode, per_row = self._decode_tokens()
        if begins:
            begins()
        logits, states, read = self.model_runner(decode, chunks)
        ended = self._finish_prefill(jobs, chunks, read, logits[len(decode) :]) if chunks else []
        started = self._start_decode()
        batch, n = self.batch, self.batch.n - len(started)
        if batch.n == 0:
            return []
        if started != ended:  # it takes a while to copy a batch's logits
            logits = torch.cat([logits[: len(decode)], *(job.logits for job in started)])
        if per_row is not None and started:
            per_row = np.concatenate([per_row, np.ones(len(started), dtype=np.int64)])
        sampling_step = SamplingStep(batch, logits, per_row)
        if self.mtp_drafter is not None:
            sampling_step.states = torch.cat([states, *(job.state for job in started)])
            sampling_step.positions = np.concatenate([decode.positions.numpy(), batch.position[n : batch.n]])
        sampling_step.sample()
        self.counters.generated_tokens += sampling_step.num_sampled
        self.counters.accepted_tokens += sampling_step.num_sampled - batch.n
        return self._finish_decode(sampling_step)

    def _decode_tokens(self) -> tuple[DecodeTokens, Integers | None]:
        """What every row has to read: its newest token and the drafts after it; and how many these are a row, where
        there may be drafts.
        """
        batch, n = self.batch, self.batch.n
        last, place, tables, drafts = batch.last_token[:n], batch.position[:n], batch.block_tables[:n], batch.drafts[:n]
        if self.speculative is None or not (drafts >= 0).any():
            alone = None if self.mtp_drafter is None else np.ones(n, dtype=np.int64)
            return DecodeTokens(from_numpy(last), from_numpy(place), from_numpy(tables)), alone
        right = trim_drafts(batch, self.blocks)
        tables = batch.block_tables[:n]  # which may have grown
        self.counters.draft_tokens += int(right.sum())
        tokens = np.concatenate([last[:, None], drafts], axis=1)
        there = np.concatenate([np.ones((n, 1), dtype=bool), right], axis=1)
        places = place[:, None] + np.arange(tokens.shape[1])
        per_row = there.sum(1)
        parts = tokens[there], places[there], tables.repeat(per_row, 0)
        return DecodeTokens(*(from_numpy(part) for part in parts)), per_row

    def cancel(self, request: Request) -> None:
        """Stop a request's samples wherever they are; their blocks are free at once."""
        for row, running in reversed(list(enumerate(self.batch.sequences))):
            if running.request is request:
                self.finish(row, "cancelled")
        for queue in (self.waiting, self.prefilling, self.ready):
            for job in [j for j in queue if j.request is request]:
                queue.remove(job)
                self.blocks.free_blocks(job.blocks)
        for s in request.sequences:
            s.finish_reason = s.finish_reason or "cancelled"

    def finish(self, row: int, why: str) -> Sequence:
        """Take a row's sample out, finished."""
        ended = self.batch.save(row)
        ended.finish_reason, ended.drafter = why, None
        self._release_blocks(ended)
        self.batch.remove([row])
        return ended

    # -- admission and blocks

    def _admit(self) -> None:
        if not self.waiting:
            return
        busy = self.batch.n + sum(len(j.sequences) for j in (*self.prefilling, *self.ready))
        free = self.batch.size - busy
        # Admitting an eighth of the rows at a time keeps prompts from interrupting every step.
        if busy and free < max(1, self.batch.size // 8) and len(self.waiting) > free:
            return
        promised = sum(-(-len(j.tokens) // BLOCK) - len(j.blocks) for j in self.prefilling) + self.batch.n // BLOCK
        while self.waiting and free > 0:
            job = self.waiting[0]
            promised += -(-len(job.tokens) // BLOCK) + 1
            if free < self.batch.size and promised > self.blocks.free:
                return
            self.waiting.popleft()
            if self.prefix_cache and job.request.prompt_logprobs is None:  # which every token is to be read for
                self._match_prefix(job)
            self.prefilling.append(job)
            free -= len(job.sequences)

    def _match_prefix(self, job: PrefillJob) -> None:
        """Begin a job with the blocks that are in the cache already; its last token is computed in any case."""
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
        """Blocks for the next token of every row; then pieces of prompts, as far as blocks and chunk go."""
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
            for needy in [batch.sequences[row] for row in lacking]:  # the oldest first: those that came last give way
                block = self._allocate_or_preempt(needy) if needy in batch.sequences else None
                if block is not None:
                    batch.add_blocks([batch.sequences.index(needy)], [block])
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

    def _allocate_or_preempt(self, needy: Sequence | PrefillJob) -> int | None:
        """A block for `needy`, from whoever came last if need be; None when that is itself, and it gave way."""
        while (block := self.blocks.allocate()) is None:
            victim: Sequence | PrefillJob
            if self.ready:
                victim = self.ready.pop()
            elif self.prefilling and self.prefilling[-1] is not needy:
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
            if saved is needy:
                return None
        return block

    def _release_blocks(self, saved: Sequence) -> None:
        if self.prefix_cache:
            # The newest token has not been read yet.
            self._cache_blocks((saved.request.prompt + tuple(saved.tokens))[:-1], saved.blocks)
        self.blocks.free_blocks(saved.blocks)
        saved.blocks = []

    def _cache_blocks(self, tokens: tuple[int, ...], blocks: list[int]) -> None:
        key = b""
        for block, start in zip(blocks, range(0, len(tokens) - BLOCK + 1, BLOCK), strict=False):
            key = block_key(key, tokens[start : start + BLOCK])
            self.blocks.insert(block, key)

    def _finish_prefill(
        self, jobs: list[tuple[PrefillJob, int]], chunks: list[PrefillChunk], states: Tensor, logits: Tensor
    ) -> list[PrefillJob]:
        """Note that pieces are in the cache, with the states [M, D] of all their tokens and logits [E, V] of the E last
        ones of prompts → the jobs that these end.
        """
        if self.mtp_drafter is not None:
            self.mtp_drafter.read(chunks, states)
        self.counters.prompt_tokens += len(states)
        ended: list[PrefillJob] = []
        for (job, length), part in zip(jobs, states.split([length for _, length in jobs]), strict=True):
            if job.request.prompt_logprobs is not None:
                job.request.prompt_logprobs.read(part, job.num_computed)
            job.num_computed += length
            if self.prefix_cache:
                self._cache_blocks(job.tokens[: job.num_computed], job.blocks)
            if job.num_computed == len(job.tokens):
                job.logits, job.state = logits[len(ended) : len(ended) + 1].clone(), part[-1:].clone()
                ended.append(job)
                self.prefilling.remove(job)
                if job.sequences:
                    self.ready.append(job)
                else:
                    self.blocks.free_blocks(job.blocks)
        return ended

    # -- tokens

    def _start_decode(self) -> list[PrefillJob]:
        """Give free rows to samples whose prompt is in the cache → the job of each.

        Samples share its full blocks; each but the last copies the one that is not full.
        """
        begun, sources, targets = [], [], []
        while self.ready and self.batch.n < self.batch.size:
            job = self.ready[0]
            full = len(job.tokens) // BLOCK
            partly = len(job.blocks) > full
            last = len(job.sequences) == 1
            if partly and not last:
                copy = self.blocks.allocate()
                if copy is None:
                    if self.batch.n == 0:  # alone, it must be able to go on
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
            started = job.sequences.pop(0)
            started.blocks = blocks
            self.batch.add(started, len(job.tokens) - 1)
            begun.append(job)
            if last:
                self.ready.popleft()
        if sources:
            self.kv_cache.copy(sources, targets)
        return begun

    def _requeue_all_but_first(self, job: PrefillJob) -> None:
        """Let all but the first of a job's samples come again later."""
        for later in reversed(job.sequences[1:]):
            self.waiting.appendleft(PrefillJob(job.request, job.tokens, [later]))
        job.sequences = job.sequences[:1]

    def _finish_decode(self, sampling_step: SamplingStep) -> list[Sequence]:
        """Let go what has ended, and guess further for what goes on."""
        batch, finished = self.batch, sampling_step.finished
        watched = batch.streaming[: batch.n].nonzero()[0].tolist() if batch.any_streaming else []
        grown = [batch.sequences[row] for row in watched if row not in finished]
        if self.speculative == "ngram" or (self.mtp_drafter is not None and batch.n <= MOST):
            self._propose_drafts(sampling_step)
        ended = []
        for row, why in finished.items():
            saved = batch.save(row)
            saved.finish_reason, saved.drafter = "stop" if why == STOP_TOKEN else "length", None
            self._release_blocks(saved)
            ended.append(saved)
        if finished:
            batch.remove(list(finished))
        return ended + grown

    def _propose_drafts(self, sampling_step: SamplingStep) -> None:
        """Answers with stop strings get no drafts: a string is found in the text, a token later than it ends."""
        alive = [
            r not in sampling_step.finished and not s.request.params.stop for r, s in enumerate(self.batch.sequences)
        ]
        if not any(alive):
            return
        which = np.array(alive)
        if self.mtp_drafter is None:
            propose_lookup(self.batch, which.nonzero()[0])
        else:
            self.mtp_drafter.propose(self.batch, which.nonzero()[0], *sampling_step.accepted(which))
