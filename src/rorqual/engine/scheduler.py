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

from rorqual.engine.blocks import BLOCK, Blocks, block_key
from rorqual.engine.cache import BlockCache
from rorqual.engine.choose import Turn
from rorqual.engine.forward import Forward, Lanes, Piece
from rorqual.engine.rows import Integers, Request, Rows, Sample
from rorqual.engine.speculate import MOST, Module, Way, fit, look_up
from rorqual.kernels.extend import TOKEN
from rorqual.model import Transformer


@dataclass(eq=False)
class Job:
    """Tokens to bring into the cache, and the samples that go on from there."""

    request: Request
    tokens: tuple[int, ...]  # the prompt, and what a sample that gave its blocks back had made
    samples: list[Sample]
    done: int = 0  # tokens in the cache
    blocks: list[int] = field(default_factory=list)
    # Of the last token, [1, V] and [1, D], when all are.
    logits: Tensor | None = None
    state: Tensor | None = None

    def piece(self, length: int) -> Piece:
        """The next so many tokens."""
        end = self.done + length
        tokens = torch.tensor(self.tokens[self.done : end + 1])
        return Piece(tokens[:length], tokens[1:], self.done, self.blocks)


@dataclass
class Counts:
    """What has happened since the beginning."""

    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # found in the cache
    made_tokens: int = 0
    preempted: int = 0
    drafted: int = 0  # guesses at tokens that were checked
    accepted: int = 0  # and right


class Scheduler:
    """`slots` sequences at most, in the blocks of one cache; `chunk` prompt tokens a step at most."""

    def __init__(
        self, model: Transformer, slots: int, cache: BlockCache, blocks: Blocks, keep: bool, chunk: int,
        speculate: Way | None = None,
    ) -> None:  # fmt: skip
        """keep: remember full blocks for prompts that begin the same way. speculate: where drafts come from."""
        self.model, self.cache, self.blocks, self.keep, self.chunk = model, cache, blocks, keep, chunk
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []  # partly in the cache, oldest first
        self.ready: deque[Job] = deque()  # wholly in it; their samples wait for rows
        self.rows = Rows(slots)
        self.forward = Forward(model, cache)
        self.module = Module(model, cache) if speculate == "mtp" else None
        self.speculate = speculate
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
    def step(self, begins: Callable[[], None] | None = None) -> list[Sample]:
        """One step; returns the samples that ended, and those whose request is watched."""
        self._admit()
        jobs = self._pieces()
        pieces = [job.piece(length) for job, length in jobs]
        lanes, per_row = self._lanes()
        if begins:
            begins()
        logits, states, read = self.forward(lanes, pieces)
        ended = self._read(jobs, pieces, read, logits[len(lanes) :]) if pieces else []
        started = self._start()
        rows, n = self.rows, self.rows.n - len(started)
        if rows.n == 0:
            return []
        if started != ended:  # it takes a while to copy a batch's logits
            logits = torch.cat([logits[: len(lanes)], *(job.logits for job in started)])
        if per_row is not None and started:
            per_row = np.concatenate([per_row, np.ones(len(started), dtype=np.int64)])
        turn = Turn(rows, logits, per_row)
        if self.module is not None:
            turn.states = torch.cat([states, *(job.state for job in started)])
            turn.places = np.concatenate([lanes.places.numpy(), rows.place[n : rows.n]])
        turn.take()
        self.counts.made_tokens += turn.made
        self.counts.accepted += turn.made - rows.n
        return self._finish(turn)

    def _lanes(self) -> tuple[Lanes, Integers | None]:
        """What every row has to read: its newest token and the drafts after it; and how many these are a row, where
        there may be drafts.
        """
        rows, n = self.rows, self.rows.n
        last, place, tables, drafts = rows.last[:n], rows.place[:n], rows.tables[:n], rows.drafts[:n]
        if self.speculate is None or not (drafts >= 0).any():
            alone = None if self.module is None else np.ones(n, dtype=np.int64)
            return Lanes(from_numpy(last), from_numpy(place), from_numpy(tables)), alone
        right = fit(rows, self.blocks)
        tables = rows.tables[:n]  # which may have grown
        self.counts.drafted += int(right.sum())
        tokens = np.concatenate([last[:, None], drafts], axis=1)
        there = np.concatenate([np.ones((n, 1), dtype=bool), right], axis=1)
        places = place[:, None] + np.arange(tokens.shape[1])
        per_row = there.sum(1)
        parts = tokens[there], places[there], tables.repeat(per_row, 0)
        return Lanes(*(from_numpy(part) for part in parts)), per_row

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
        ended.finish, ended.lookup = why, None
        self._give_back(ended)
        self.rows.remove([row])
        return ended

    # -- admission and blocks

    def _admit(self) -> None:
        if not self.waiting:
            return
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
            if self.keep and job.request.scoring is None:  # which every token is to be read for
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
        lacking = (rows.place[: rows.n] >= rows.held[: rows.n] * BLOCK).nonzero()[0].tolist() if rows.lacking else []
        if len(lacking) <= self.blocks.free:
            if lacking:
                rows.add_blocks(lacking, [self.blocks.take() for _ in lacking])
            rows.lacking = False
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

    def _read(self, jobs: list[tuple[Job, int]], pieces: list[Piece], states: Tensor, logits: Tensor) -> list[Job]:
        """Note that pieces are in the cache, with the states [M, D] of all their tokens and logits [E, V] of the E last
        ones of prompts → the jobs that these end.
        """
        if self.module is not None:
            self.module.read(pieces, states)
        self.counts.prompt_tokens += len(states)
        ended: list[Job] = []
        for (job, length), part in zip(jobs, states.split([length for _, length in jobs]), strict=True):
            if job.request.scoring is not None:
                job.request.scoring.read(part, job.done)
            job.done += length
            if self.keep:
                self._remember(job.tokens[: job.done], job.blocks)
            if job.done == len(job.tokens):
                job.logits, job.state = logits[len(ended) : len(ended) + 1].clone(), part[-1:].clone()
                ended.append(job)
                self.jobs.remove(job)
                if job.samples:
                    self.ready.append(job)
                else:
                    self.blocks.release(job.blocks)
        return ended

    # -- tokens

    def _start(self) -> list[Job]:
        """Give free rows to samples whose prompt is in the cache → the job of each.

        Samples share its full blocks; each but the last copies the one that is not full.
        """
        begun, sources, targets = [], [], []
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
            self.rows.add(started, len(job.tokens) - 1)
            begun.append(job)
            if last:
                self.ready.popleft()
        if sources:
            self.cache.copy(sources, targets)
        return begun

    def _separate(self, job: Job) -> None:
        """Let all but the first of a job's samples come again later."""
        for later in reversed(job.samples[1:]):
            self.waiting.appendleft(Job(job.request, job.tokens, [later]))
        job.samples = job.samples[:1]

    def _finish(self, turn: Turn) -> list[Sample]:
        """Let go what has ended, and guess further for what goes on."""
        rows, finished = self.rows, turn.finished
        watched = rows.watched[: rows.n].nonzero()[0].tolist() if rows.any_watched else []
        grown = [rows.samples[row] for row in watched if row not in finished]
        if self.speculate == "lookup" or (self.module is not None and rows.n <= MOST):
            self._draft(turn)
        ended = []
        for row, why in finished.items():
            saved = rows.save(row)
            saved.finish, saved.lookup = "stop" if why == TOKEN else "length", None
            self._give_back(saved)
            ended.append(saved)
        if finished:
            rows.remove(list(finished))
        return ended + grown

    def _draft(self, turn: Turn) -> None:
        """Answers with stop strings get no drafts: a string is found in the text, a token later than it ends."""
        alive = [r not in turn.finished and not s.request.params.stop for r, s in enumerate(self.rows.samples)]
        if not any(alive):
            return
        which = np.array(alive)
        if self.module is None:
            look_up(self.rows, which.nonzero()[0])
        else:
            self.module.draft(self.rows, which.nonzero()[0], *turn.read(which))
