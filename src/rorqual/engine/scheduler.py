"""What runs in the next step: a token of every running sequence, and as much of waiting prompts as a step may hold.

Finished sequences leave at once, waiting ones enter (Yu et al. 2022, Orca). When the cache is full, what came last
gives its blocks back and is computed again later; nothing that was made is lost.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.engine.blocks import BLOCK, Blocks, block_key
from rorqual.engine.cache import BlockCache, Prompt, Step
from rorqual.engine.direct import direct_step
from rorqual.engine.rows import Request, Rows, Sample
from rorqual.engine.sampler import adjust, sample
from rorqual.kernels.linear import any_shape, linear
from rorqual.model import Transformer


@dataclass(eq=False)
class Job:
    """Tokens to bring into the cache, and the samples that go on from there."""

    request: Request
    tokens: tuple[int, ...]  # the prompt, and what a sample that gave its blocks back had made
    samples: list[Sample]
    done: int = 0  # tokens in the cache
    blocks: list[int] = field(default_factory=list)
    hidden: Tensor | None = None  # [D] of the last token, when all are


@dataclass
class Counts:
    """What has happened since the beginning."""

    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # found in the cache
    made_tokens: int = 0
    preempted: int = 0


class Scheduler:
    """`slots` sequences at most, in the blocks of one cache; `chunk` prompt tokens a step at most."""

    def __init__(
        self, model: Transformer, slots: int, cache: BlockCache, blocks: Blocks, keep: bool, chunk: int
    ) -> None:
        """keep: remember full blocks for prompts that begin the same way."""
        self.model, self.cache, self.blocks, self.keep, self.chunk = model, cache, blocks, keep, chunk
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []  # partly in the cache, oldest first
        self.ready: deque[Job] = deque()  # wholly in it; their samples wait for rows
        self.rows = Rows(slots)
        self.direct = direct_step(model, cache)
        self.counts = Counts()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.jobs or self.ready or self.rows.n)

    @property
    def samples_waiting(self) -> int:
        return sum(len(job.samples) for job in (*self.waiting, *self.jobs, *self.ready))

    def add(self, request: Request) -> None:
        self.waiting.append(Job(request, request.prompt, list(request.samples)))

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """One step; returns the samples that ended, and those whose request is watched."""
        self._admit()
        chunks = self._pieces()
        n = self.rows.n
        # Rows take the short way whatever else there is to compute: what they say must not depend on their company.
        logits = [self._direct()] if self.direct is not None and n else []
        at = 0 if self.direct is not None else self._computed_rows()
        hidden = self._forward(chunks, at) if at or chunks else None
        parts = [hidden[:n]] if at else []
        for job, length in chunks:
            at += length
            job.done += length
            if self.keep:
                self._remember(job.tokens[: job.done], job.blocks)
            if job.done == len(job.tokens):
                assert hidden is not None
                job.hidden = hidden[at - 1].clone()
                self.jobs.remove(job)
                self.ready.append(job)
        self.rows.place[:n] += 1
        parts += self._start()
        if self.rows.n == 0:
            return []
        if parts:
            logits.append(linear(torch.cat(parts) if len(parts) > 1 else parts[0], self.model.head_weight))
        return self._extend(torch.cat([x.float() for x in logits]) if len(logits) > 1 else logits[0])

    def cancel(self, request: Request) -> None:
        """Stop a request's samples wherever they are; their blocks are free at once."""
        for row, running in reversed(list(enumerate(self.rows.samples))):
            if running.request is request:
                self.end(row, "cancelled")
        for queue in (self.waiting, self.jobs, self.ready):
            for job in [j for j in queue if j.request is request]:
                queue.remove(job)
                self.blocks.release(job.blocks)
        for s in request.samples:
            s.finish = s.finish or "cancelled"

    def end(self, row: int, why: str) -> Sample:
        """Take a row's sample out, finished."""
        ended = self.rows.save(row)
        ended.finish = why
        self._give_back(ended)
        self.rows.remove([row])
        return ended

    # -- admission and blocks

    def _admit(self) -> None:
        busy = self.rows.n + sum(len(j.samples) for j in (*self.jobs, *self.ready))
        free = self.rows.size - busy
        # Admitting an eighth of the rows at a time keeps prompts from interrupting every step.
        if busy and free < max(1, self.rows.size // 8) and len(self.waiting) > free:
            return
        promised = sum(-(-len(j.tokens) // BLOCK) - len(j.blocks) for j in self.jobs) + self.rows.n // BLOCK
        while self.waiting and free > 0:
            job = self.waiting[0]
            promised += -(-len(job.tokens) // BLOCK) + 1
            if free < self.rows.size and promised > self.blocks.free:
                return
            self.waiting.popleft()
            if self.keep:
                self._find(job)
            self.jobs.append(job)
            free -= len(job.samples)

    def _find(self, job: Job) -> None:
        """Begin a job with the blocks that are in the cache already; its last token is computed in any case."""
        key = b""
        for start in range(0, len(job.tokens) - BLOCK, BLOCK):
            key = block_key(key, job.tokens[start : start + BLOCK])
            block = self.blocks.find(key)
            if block is None:
                break
            self.blocks.hold(block)
            job.blocks.append(block)
        job.done = len(job.blocks) * BLOCK
        self.counts.cached_tokens += job.done
        if job.tokens is job.request.prompt:
            job.request.cached = job.done

    def _pieces(self) -> list[tuple[Job, int]]:
        """Blocks for the next token of every row; then pieces of prompts, as far as blocks and chunk go."""
        rows = self.rows
        lacking = (rows.place[: rows.n] >= rows.held[: rows.n] * BLOCK).nonzero().flatten().tolist()
        if len(lacking) <= self.blocks.free:
            if lacking:
                rows.add_blocks(lacking, [self.blocks.take() for _ in lacking])
        else:
            for needy in [rows.samples[row] for row in lacking]:  # the oldest first: those that came last give way
                block = self._take_or_preempt(needy) if needy in rows.samples else None
                if block is not None:
                    rows.add_blocks([rows.samples.index(needy)], [block])
        chosen, left = [], self.chunk
        for job in self.jobs:
            length = min(left, len(job.tokens) - job.done)
            while len(job.blocks) * BLOCK < job.done + length:
                block = self.blocks.take()
                if block is None and not rows.n and not chosen:
                    block = self._take_or_preempt(job)
                if block is None:
                    break
                job.blocks.append(block)
            length = min(length, len(job.blocks) * BLOCK - job.done)
            if length <= 0:
                break
            chosen.append((job, length))
            left -= length
            if left == 0:
                break
        return chosen

    def _take_or_preempt(self, needy: Sample | Job) -> int | None:
        """A block for `needy`, from whoever came last if need be; None when that is itself, and it gave way."""
        while (block := self.blocks.take()) is None:
            victim: Sample | Job
            if self.ready:
                victim = self.ready.pop()
            elif self.jobs and self.jobs[-1] is not needy:
                victim = self.jobs.pop()
            else:
                victim = self.rows.samples[-1]
            self.counts.preempted += 1
            if isinstance(victim, Job):
                self.blocks.release(victim.blocks)
                self.waiting.appendleft(Job(victim.request, victim.tokens, victim.samples))
                continue
            saved = self.rows.save(self.rows.n - 1)
            self.rows.remove([self.rows.n - 1])
            self._give_back(saved)
            self.waiting.appendleft(Job(saved.request, saved.request.prompt + tuple(saved.tokens), [saved]))
            if saved is needy:
                return None
        return block

    def _give_back(self, saved: Sample) -> None:
        if self.keep:
            # The newest token has not been read yet.
            self._remember((saved.request.prompt + tuple(saved.tokens))[:-1], saved.blocks)
        self.blocks.release(saved.blocks)
        saved.blocks = []

    def _remember(self, tokens: tuple[int, ...], blocks: list[int]) -> None:
        key = b""
        for block, start in zip(blocks, range(0, len(tokens) - BLOCK + 1, BLOCK), strict=False):
            key = block_key(key, tokens[start : start + BLOCK])
            self.blocks.remember(block, key)

    # -- computation

    def _direct(self) -> Tensor:
        """Logits after the new tokens of rows, in one call."""
        rows, n = self.rows, self.rows.n
        assert self.direct is not None
        return self.direct(rows.last[:n], rows.tables[:n], (rows.place[:n] + 1).to(torch.int32))

    def _forward(self, chunks: list[tuple[Job, int]], computed: int) -> Tensor:
        """Hidden states of the new tokens of `computed` rows (idle ones too), then of chunks, end to end."""
        rows, n = self.rows, min(self.rows.n, computed)
        places, last, tables = rows.place[:computed].clone(), rows.last[:computed], rows.tables[:computed].clone()
        places[n:] = tables[n:] = 0
        prompts = [Prompt(job.done, length, job.blocks) for job, length in chunks]
        step = Step(self.cache, tables, places, prompts)
        fresh = [torch.tensor(job.tokens[job.done : job.done + length]) for job, length in chunks]
        tokens = torch.cat([last, *fresh]).unsqueeze(0).to(step.index.device)
        self.counts.prompt_tokens += sum(length for _, length in chunks)
        return self.model(tokens, step.positions, cache=step)[0]

    def _computed_rows(self) -> int:
        """Rows to compute: those that run and, where a new shape costs something, idle ones up to one of eight sizes an
        octave: a batch that shrinks by one sequence at a time has as many shapes as sequences.
        """
        n = self.rows.n
        # Latent attention has products of its own, between linears and cache.
        if n == 0 or (not self.model.config.is_mla and any_shape(self.model.head_weight, n)):
            return n
        step = 1 << max(0, n.bit_length() - 4)
        return min(self.rows.size, -(-n // step) * step)

    def _start(self) -> list[Tensor]:
        """Give free rows to samples whose prompt is in the cache → the hidden states they go on from, [1, D] each.

        Samples share its full blocks; each but the last copies the one that is not full.
        """
        hidden, sources, targets = [], [], []
        while self.ready and self.rows.n < self.rows.size:
            job = self.ready[0]
            full = len(job.tokens) // BLOCK
            partly = len(job.blocks) > full
            last = len(job.samples) == 1
            if partly and not last:
                copy = self.blocks.take()
                if copy is None:
                    if self.rows.n == 0:  # alone, it must be able to go on
                        self._separate(job)
                        continue
                    break
                sources.append(job.blocks[full])
                targets.append(copy)
                blocks = [*job.blocks[:full], copy]
            else:
                blocks = list(job.blocks)
            if not last:
                for block in job.blocks[:full]:
                    self.blocks.hold(block)
            started = job.samples.pop(0)
            started.blocks = blocks
            self.rows.add(started, len(job.tokens))
            assert job.hidden is not None
            hidden.append(job.hidden.unsqueeze(0))
            if last:
                self.ready.popleft()
        if sources:
            self.cache.copy(sources, targets)
        return hidden

    def _separate(self, job: Job) -> None:
        """Let all but the first of a job's samples come again later."""
        for later in reversed(job.samples[1:]):
            self.waiting.appendleft(Job(job.request, job.tokens, [later]))
        job.samples = job.samples[:1]

    def _extend(self, logits: Tensor) -> list[Sample]:
        """Sample a token for every row from logits [n, V], record it, let go what ended."""
        rows, n = self.rows, self.rows.n
        special = rows.special[:n].nonzero().flatten().tolist()
        if special:
            logits = logits.float()
            for row in special:
                self._adjust(row, logits)
        uniform = rows.draws().to(logits.device)
        cuts = rows.cuts()
        if len(cuts) == 1:
            tokens, logprobs = (t.cpu() for t in sample(logits, cuts[0][0], uniform))
        else:
            tokens, logprobs = torch.zeros(n, dtype=torch.long), torch.zeros(n)
            for cut, where in cuts:
                at = where.to(logits.device)
                tokens[where], logprobs[where] = (t.cpu() for t in sample(logits[at], cut, uniform[at]))
        forced = (rows.closed[:n] == 0) & (rows.count[:n] >= rows.budget[:n])
        tokens = torch.where(forced, rows.think_end[:n], tokens)
        rows.closed[:n] |= tokens == rows.think_end[:n]
        rows.record(tokens, logprobs)
        self.counts.made_tokens += n
        stopped = (tokens.unsqueeze(1) == rows.stops[:n]).any(1)
        ended = (stopped | (rows.count[:n] >= rows.limit[:n])).nonzero().flatten().tolist()
        finished = []
        for row in ended:
            saved = rows.save(row)
            saved.finish = "stop" if stopped[row] else "length"
            self._give_back(saved)
            finished.append(saved)
        watched = []
        for row in rows.watched[:n].nonzero().flatten().tolist():
            reader = rows.samples[row]
            if reader.finish is None:
                reader.tokens.append(int(tokens[row]))
                reader.logprobs.append(float(logprobs[row]))
                watched.append(reader)
        if ended:
            rows.remove(ended)
        return finished + watched

    def _adjust(self, row: int, logits: Tensor) -> None:
        """Penalties, biases and grammar of one row; and the most probable tokens, where they are to be reported."""
        rows, running = self.rows, self.rows.samples[row]
        params = running.request.params
        made = rows.tokens[row, : rows.count[row]]
        if params.adjusts:
            logits[row] = adjust(logits[row], params, torch.tensor(running.request.prompt), made)
        if running.guide is not None and (forbidden := running.guide.forbidden(made.tolist())) is not None:
            logits[row].masked_fill_(forbidden.to(logits.device), float("-inf"))
        if params.logprobs:
            logp = (logits[row] / (params.temperature or 1.0)).log_softmax(-1)
            best = logp.topk(min(params.logprobs, len(logp)))
            running.top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
