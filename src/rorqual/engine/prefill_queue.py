"""Requests on their way to the decode batch: admission, chunks of prompts for every step, preemption."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.model_runner import PrefillChunk
from rorqual.engine.outputs import Counters
from rorqual.engine.sequence import Request, Sequence

NO_OUTPUT = torch.empty(0)


@dataclass(eq=False)
class PrefillJob:
    """Tokens to prefill, and the sequences that decode from there."""

    request: Request
    tokens: tuple[int, ...]  # the prompt; for a preempted sequence also its generated tokens
    sequences: list[Sequence]
    num_computed: int = 0  # tokens in the KV cache
    blocks: list[int] = field(default_factory=list)
    # Of the last token, [1, V] and [1, D], set when the prefill is complete.
    logits: Tensor = NO_OUTPUT
    state: Tensor = NO_OUTPUT

    def next_chunk(self, length: int) -> PrefillChunk:
        """The next `length` tokens."""
        end = self.num_computed + length
        tokens = torch.tensor(self.tokens[self.num_computed : end + 1])
        return PrefillChunk(tokens[:length], tokens[1:], self.num_computed, self.blocks, self.request.adapter)


class PrefillQueue:
    """Jobs pass from `waiting` to `prefilling`, both oldest first, and to `ready`: prefilled, their sequences wait for
    rows of the decode batch. A step prefills at most `max_prefill_tokens` tokens.
    """

    def __init__(self, blocks: BlockManager, max_prefill_tokens: int, counters: Counters) -> None:
        self.blocks, self.max_prefill_tokens, self.counters = blocks, max_prefill_tokens, counters
        self.waiting: deque[PrefillJob] = deque()
        self.prefilling: list[PrefillJob] = []
        self.ready: deque[PrefillJob] = deque()

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.prefilling or self.ready)

    @property
    def num_sequences(self) -> int:
        return sum(len(job.sequences) for job in (*self.waiting, *self.prefilling, *self.ready))

    def add(self, request: Request) -> None:
        self.waiting.append(PrefillJob(request, request.prompt, list(request.sequences)))

    def add_preempted(self, sequence: Sequence) -> None:
        """Put a running sequence back, before all others: its prompt and tokens are prefilled again."""
        tokens = sequence.request.prompt + tuple(sequence.tokens)
        self.waiting.appendleft(PrefillJob(sequence.request, tokens, [sequence]))

    def admit(self, running: int, rows: int) -> None:
        """Let waiting jobs begin that the batch has rows for, `running` of whose `rows` are taken, and the KV cache
        blocks.
        """
        if not self.waiting:
            return
        busy = running + sum(len(j.sequences) for j in (*self.prefilling, *self.ready))
        free = rows - busy
        # Admitting an eighth of the rows at a time keeps prefill from slowing every decode step.
        if busy and free < max(1, rows // 8) and len(self.waiting) > free:
            return
        promised = sum(-(-len(j.tokens) // BLOCK) - len(j.blocks) for j in self.prefilling) + running // BLOCK
        while self.waiting and free > 0:
            job = self.waiting[0]
            promised += -(-len(job.tokens) // BLOCK) + 1
            if free < rows and promised > self.blocks.free:
                return
            self.waiting.popleft()
            if job.request.prompt_logprobs is None:  # they need every token's hidden state
                self._match_prefix(job)
            self.prefilling.append(job)
            free -= len(job.sequences)

    def _match_prefix(self, job: PrefillJob) -> None:
        """Start a job from its longest prefix in the prefix cache; the last token is always computed."""
        job.blocks = self.blocks.match_prefix(job.tokens[:-1], job.request.adapter)
        job.num_computed = len(job.blocks) * BLOCK
        self.counters.cached_tokens += job.num_computed
        if job.tokens is job.request.prompt:
            job.request.cached_tokens = job.num_computed

    def schedule(self, running: int) -> tuple[list[PrefillJob], list[PrefillChunk]]:
        """Allocate blocks for this step's chunks of prompts → their jobs, and the chunks."""
        jobs: list[PrefillJob] = []
        chunks: list[PrefillChunk] = []
        left = self.max_prefill_tokens
        for job in self.prefilling:
            length = min(left, len(job.tokens) - job.num_computed)
            while len(job.blocks) * BLOCK < job.num_computed + length:
                block = self.blocks.allocate()
                while block is None and not running and not jobs and self.preempt_newest(keep=job):
                    block = self.blocks.allocate()
                if block is None:
                    break
                job.blocks.append(block)
            length = min(length, len(job.blocks) * BLOCK - job.num_computed)
            if length <= 0:
                break
            jobs.append(job)
            chunks.append(job.next_chunk(length))
            left -= length
            if left == 0:
                break
        return jobs, chunks

    def finish(
        self, jobs: list[PrefillJob], chunks: list[PrefillChunk], states: Tensor, logits: Tensor
    ) -> list[PrefillJob]:
        """Record chunks as computed → the jobs whose prefill is complete.

        states [M, D]: hidden states of all the chunks' tokens; logits [E, V]: of the last tokens of the E prompts that
        end here.
        """
        self.counters.prompt_tokens += len(states)
        prefilled: list[PrefillJob] = []
        lengths = [len(chunk.tokens) for chunk in chunks]
        for job, length, part in zip(jobs, lengths, states.split(lengths), strict=True):
            if job.request.prompt_logprobs is not None:
                job.request.prompt_logprobs.append(part, job.num_computed)
            job.num_computed += length
            if self.blocks.prefix_cache:
                self.blocks.cache_blocks(job.tokens[: job.num_computed], job.blocks, job.request.adapter)
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

    def requeue_all_but_first(self, job: PrefillJob) -> None:
        """Put all but the first of a job's sequences back into the waiting queue."""
        for sequence in reversed(job.sequences[1:]):
            self.waiting.appendleft(PrefillJob(job.request, job.tokens, [sequence]))
        job.sequences = job.sequences[:1]

    def preempt_newest(self, keep: PrefillJob | None = None) -> bool:
        """Free the blocks of the most recent job, and let it wait again; False where there is none but `keep`."""
        if self.ready:
            job = self.ready.pop()
        elif self.prefilling and self.prefilling[-1] is not keep:
            job = self.prefilling.pop()
        else:
            return False
        self.counters.preemptions += 1
        self.blocks.free_blocks(job.blocks)
        self.waiting.appendleft(PrefillJob(job.request, job.tokens, job.sequences))
        return True

    def cancel(self, request: Request) -> None:
        for queue in (self.waiting, self.prefilling, self.ready):
            for job in [j for j in queue if j.request is request]:
                queue.remove(job)
                self.blocks.free_blocks(job.blocks)
