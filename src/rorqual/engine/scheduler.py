"""Continuous batching (Yu et al. 2022, Orca): a step decodes every running sequence and prefills waiting prompts.

Prefill is chunked: at most `max_prefill_tokens` prompt tokens a step. Finished sequences leave at once. When the KV
cache is full, prompts in prefill are preempted, then the newest sequences: their blocks are freed, and prompt and
generated tokens are prefilled again later.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, from_numpy

from rorqual.adapters.served import ServedAdapters
from rorqual.engine.batch import DecodeBatch
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.model_runner import DecodeTokens, ModelRunner
from rorqual.engine.outputs import Counters, Status
from rorqual.engine.paged_kv_cache import PagedKVCache
from rorqual.engine.prefill_queue import PrefillJob, PrefillQueue
from rorqual.engine.sampling import SamplingStep
from rorqual.engine.sequence import Integers, Request, Sequence
from rorqual.engine.speculative import MAX_MTP_SEQS, MTPDrafter, SpeculativeMethod, propose_lookup, trim_drafts
from rorqual.kernels.append_tokens import STOP_TOKEN
from rorqual.model import Transformer
from rorqual.precision.exact import ExactTransformer


class Scheduler:
    """Decodes at most `max_num_seqs` sequences and prefills at most `max_prefill_tokens` tokens a step.

    speculative: where draft tokens come from. adapters: those that requests may name.
    """

    def __init__(
        self, model: Transformer, max_num_seqs: int, kv_cache: PagedKVCache, blocks: BlockManager,
        max_prefill_tokens: int, speculative: SpeculativeMethod | None = None,
        adapters: ServedAdapters | None = None,
    ) -> None:  # fmt: skip
        self.kv_cache, self.blocks = kv_cache, blocks
        self.counters = Counters()
        self.prefill = PrefillQueue(blocks, max_prefill_tokens, self.counters)
        self.batch = DecodeBatch(max_num_seqs)
        self.model_runner = ModelRunner(model, kv_cache, adapters)
        self.adapters = adapters
        self.mtp_drafter = MTPDrafter(model, kv_cache) if speculative == "mtp" else None
        self.speculative = speculative
        self.exact = isinstance(model, ExactTransformer)
        self._num_requests = 0

    @property
    def idle(self) -> bool:
        return self.prefill.empty and not self.batch.n

    def status(self) -> Status:
        blocks = self.blocks
        held = sum(store.nbytes for layer in self.kv_cache.layers for store in layer)
        used, count = blocks.count - 1 - blocks.free, blocks.count - 1
        return Status(self.batch.n, self.prefill.num_sequences, used, count, held, self.counters)

    def add(self, request: Request) -> None:
        request.arrival = self._num_requests
        self._num_requests += 1
        self.prefill.add(request)

    def reset_prefix_cache(self) -> None:
        self.blocks.reset_prefix_cache()

    @torch.inference_mode()
    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        """One step → the sequences that finished, and those of streaming requests."""
        self.prefill.admit(self.batch.n, self.batch.size)
        self._allocate_for_decode()
        jobs, chunks = self.prefill.schedule(self.batch.n)
        decode, tokens_per_row = self._schedule_decode()
        if before_forward:
            before_forward()
        logits, states, prefill_states = self.model_runner(decode, chunks)
        prefilled: list[PrefillJob] = []
        if chunks:
            if self.mtp_drafter is not None:
                self.mtp_drafter.prefill(chunks, prefill_states)
            prefilled = self.prefill.finish(jobs, chunks, prefill_states, logits[len(decode) :])
        started = self._start_decode()
        if not self.batch.n:
            return []
        if started != prefilled:  # copying a batch's logits takes a while
            logits = torch.cat([logits[: len(decode)], *(job.logits for job in started)])
        sampling_step = self._sampling_step(decode, tokens_per_row, logits, states, started)
        sampling_step.sample()
        self.counters.generated_tokens += sampling_step.num_sampled
        self.counters.accepted_tokens += sampling_step.num_sampled - self.batch.n
        return self._finish(sampling_step)

    def cancel(self, request: Request) -> None:
        """Stop a request's sequences, waiting or running; their blocks are free at once."""
        rows = [row for row, running in enumerate(self.batch.sequences) if running.request is request]
        for row in rows:
            self._release(row)
        if rows:
            self.batch.remove(rows)
        self.prefill.cancel(request)
        for sequence in request.sequences:
            sequence.finish_reason, sequence.drafter = sequence.finish_reason or "cancelled", None

    # -- blocks and preemption

    def _allocate_for_decode(self) -> None:
        """Allocate a block to every row whose next token needs one, preempting the newest sequences if none is free."""
        batch = self.batch
        if not batch.needs_blocks:
            return
        lacking = (batch.position[: batch.n] >= batch.num_blocks[: batch.n] * BLOCK).nonzero()[0].tolist()
        if len(lacking) <= self.blocks.free:
            if lacking:
                batch.add_blocks(lacking, self.blocks.allocate_many(len(lacking)))
            batch.needs_blocks = False
            return
        wanting = [batch.sequences[row] for row in lacking]
        for sequence in sorted(wanting, key=lambda s: s.arrival):  # the newest are preempted
            block = self._allocate_or_preempt(sequence) if sequence in batch.sequences else None
            if block is not None:
                batch.add_blocks([batch.sequences.index(sequence)], [block])

    def _allocate_or_preempt(self, target: Sequence) -> int | None:
        """A block for `target`. If none is free, prompts in prefill are preempted, then the newest running sequences;
        None if that is `target`.
        """
        while (block := self.blocks.allocate()) is None:
            if self.prefill.preempt_newest():
                continue
            self.counters.preemptions += 1
            newest = max(range(self.batch.n), key=lambda row: self.batch.sequences[row].arrival)
            preempted = self._release(newest)
            self.batch.remove([newest])
            self.prefill.add_preempted(preempted)
            if preempted is target:
                return None
        return block

    def _release(self, row: int) -> Sequence:
        """Save a row's sequence, and free its blocks; the row is to be removed."""
        sequence = self.batch.save(row)
        if self.blocks.prefix_cache:
            # The newest token is not in the KV cache yet.
            known = (sequence.request.prompt + tuple(sequence.tokens))[:-1]
            self.blocks.cache_blocks(known, sequence.blocks, sequence.request.adapter)
        sequence.routing = self.kv_cache.routing(
            sequence.blocks, len(sequence.request.prompt) + len(sequence.tokens) - 1
        )
        self.blocks.free_blocks(sequence.blocks)
        sequence.blocks = []
        return sequence

    # -- decode

    def _schedule_decode(self) -> tuple[DecodeTokens, Integers | None]:
        """Every row's newest token and the draft tokens after it; and their number a row, None where it is 1."""
        batch, n = self.batch, self.batch.n
        last, tables, drafts = batch.last_token[:n], batch.block_tables[:n], batch.drafts[:n]
        position = batch.position[:n]
        names = None if self.adapters is None else [sequence.request.adapter for sequence in batch.sequences[:n]]
        if self.speculative is None or not (drafts >= 0).any():
            ones = None if self.mtp_drafter is None else np.ones(n, dtype=np.int64)
            return DecodeTokens(from_numpy(last), from_numpy(position), from_numpy(tables), names), ones
        kept = trim_drafts(batch, self.blocks)
        tables = batch.block_tables[:n]  # trim_drafts may have widened it
        self.counters.draft_tokens += int(kept.sum())
        tokens = np.concatenate([last[:, None], drafts], axis=1)
        used = np.concatenate([np.ones((n, 1), dtype=bool), kept], axis=1)
        positions = position[:, None] + np.arange(tokens.shape[1])
        tokens_per_row = used.sum(1)
        tables = tables.repeat(tokens_per_row, 0)
        if names is not None:
            names = [name for name, count in zip(names, tokens_per_row.tolist(), strict=True) for _ in range(count)]
        decode = DecodeTokens(from_numpy(tokens[used]), from_numpy(positions[used]), from_numpy(tables), names)
        return decode, tokens_per_row

    def _start_decode(self) -> list[PrefillJob]:
        """Give free rows to sequences whose prompt is prefilled → the job of each.

        A prompt's sequences share its full blocks; each but the last copies the block that is not full.
        """
        jobs: list[PrefillJob] = []
        sources: list[int] = []
        targets: list[int] = []
        ready = self.prefill.ready
        while ready and self.batch.n < self.batch.size:
            job = ready[0]
            full = len(job.tokens) // BLOCK
            partly = len(job.blocks) > full
            last = len(job.sequences) == 1
            if partly and not last:
                copy = self.blocks.allocate()
                if copy is None:
                    if self.batch.n == 0:  # nothing runs that could free a block
                        self.prefill.requeue_all_but_first(job)
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
                ready.popleft()
        if sources:
            self.kv_cache.copy(sources, targets)
        return jobs

    def _sampling_step(
        self, decode: DecodeTokens, tokens_per_row: Integers | None, logits: Tensor, states: Tensor,
        started: list[PrefillJob],
    ) -> SamplingStep:  # fmt: skip
        """The logits of the rows decoded and of those just started, one each, with what an MTP drafter needs."""
        if tokens_per_row is not None and started:
            tokens_per_row = np.concatenate([tokens_per_row, np.ones(len(started), dtype=np.int64)])
        step = SamplingStep(self.batch, logits, tokens_per_row, exact=self.exact)
        if self.mtp_drafter is not None:
            new = self.batch.position[self.batch.n - len(started) : self.batch.n]
            step.states = torch.cat([states, *(job.state for job in started)])
            step.positions = np.concatenate([decode.positions.numpy(), new])
        return step

    def _finish(self, step: SamplingStep) -> list[Sequence]:
        """Detokenize streaming rows, propose drafts, remove finished rows → sequences finished, and those streaming."""
        batch = self.batch
        reasons = {row: "stop" if reason == STOP_TOKEN else "length" for row, reason in step.finished.items()}
        streaming = batch.streaming[: batch.n].nonzero()[0].tolist() if batch.any_streaming else []
        found = [batch.sequences[row] for row in dict.fromkeys([*reasons, *streaming])]
        for row in streaming:
            if self._detokenize(row, last=row in reasons):
                reasons[row] = "stop"
        if self.speculative == "ngram" or (self.mtp_drafter is not None and batch.n <= MAX_MTP_SEQS):
            self._propose_drafts(step, reasons)
        for row, reason in reasons.items():
            sequence = self._release(row)
            sequence.finish_reason, sequence.drafter = reason, None
        if reasons:
            batch.remove(list(reasons))
        return found

    def _detokenize(self, row: int, last: bool) -> bool:
        """Read a row's new tokens as text → whether it ends in a stop string. last: the row has finished."""
        sequence = self.batch.sequences[row]
        text = sequence.detokenizer
        if text is None:
            return False
        text.feed(sequence.text_tokens, last)
        if text.thinking and sequence.unopened and not last:
            self.batch.open_thinking(row)
        return text.stopped

    def _propose_drafts(self, step: SamplingStep, finished: dict[int, str]) -> None:
        """Requests with stop strings get no drafts: a stop string is found in the text only after the step."""
        drafting = [
            row not in finished and not sequence.request.params.stop
            for row, sequence in enumerate(self.batch.sequences)
        ]
        if not any(drafting):
            return
        which = np.array(drafting)
        if self.mtp_drafter is None:
            propose_lookup(self.batch, which.nonzero()[0])
        else:
            self.mtp_drafter.propose(self.batch, which.nonzero()[0], *step.mtp_inputs(which))
