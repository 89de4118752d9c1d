"""Run the engine in a thread of its own, with requests from asyncio."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.batch import Request, Sequence
from rorqual.engine.prompt_logprobs import Ranked
from rorqual.errors import UserError

log = logging.getLogger("rorqual.serve")


class QueueFull(Exception):
    """The queue is full."""


class EngineError(Exception):
    """The engine failed; the client may retry."""


@dataclass
class TokenDelta:
    """New tokens of one sequence; `finish` is set in its last delta."""

    index: int  # index of the prompt · n + index of the sequence
    reasoning: str
    content: str
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None
    reasoning_prefix: int  # how many of these tokens, from the first on, belong to the thinking
    reasoning_tokens: int  # in total so far, of those that text was made of


class RequestHandle:
    """Submitted prompts with common sampling parameters; fetch its deltas until every sequence has finished.

    raw: thinking and answer are not split. Must be closed (EngineThread.close) in any case.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, raw: bool) -> None:
        self.prompts, self.params, self.raw = prompts, params, raw
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()  # UserError for an invalid prompt
        self._deltas: list[TokenDelta | Exception] = []
        self._waiter: asyncio.Future[None] | None = None
        self.requests: list[Request] = []
        self.sent: dict[Sequence, tuple[int, int, int]] = {}  # of reasoning, of content, tokens
        self.cached_tokens = 0  # prompt tokens found in the prefix cache

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.params.n

    def put(self, deltas: list[TokenDelta | Exception]) -> None:
        """Add deltas, in the loop's thread. An exception is raised where the deltas are read."""
        self._deltas += deltas
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def fetch(self) -> list[TokenDelta | Exception]:
        """Wait for deltas → those since the last call. An asyncio.Queue would take several times as long."""
        if not self._deltas:
            self._waiter = self.loop.create_future()
            await self._waiter
        deltas, self._deltas = self._deltas, []
        return deltas


class EngineThread:
    """Accepts max_num_seqs sequences of the engine and max_queue more; `open` raises QueueFull beyond that."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.engine, self.limit = engine, engine.max_num_seqs + max_queue
        self.count = 0  # sequences not closed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._handles: dict[Request, RequestHandle] = {}
        self._scores: dict[asyncio.Future[Request], Request] = {}
        self._outbox: dict[RequestHandle, list[TokenDelta | Exception]] = {}  # of the last step, not delivered yet
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step."""
        self._stopping = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # -- from asyncio

    def open(self, prompts: list[list[int]], params: SamplingParams, raw: bool = False) -> RequestHandle:
        """Submit prompts. Raises QueueFull; await `accepted` of the handle for other errors."""
        handle = RequestHandle(prompts, params, raw)
        if self.count + handle.num_sequences > self.limit:
            raise QueueFull
        self.count += handle.num_sequences
        self._inbox.put(lambda: self._submit(handle))
        return handle

    def close(self, handle: RequestHandle) -> None:
        """Call once for every handle: what still runs is cancelled, and its blocks are free before the next step."""
        self.count -= handle.num_sequences
        self._inbox.put(lambda: self._cancel(handle))

    async def score(self, prompt: list[int], top: int) -> tuple[list[float | None], list[Ranked]]:
        """A prompt's log-probabilities, and its most probable tokens; counts as one sequence.

        Raises QueueFull, UserError for an invalid prompt, EngineError.
        """
        if self.count >= self.limit:
            raise QueueFull
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Request] = loop.create_future()
        self.count += 1
        try:
            self._inbox.put(lambda: self._submit_score(prompt, top, future))
            scoring = (await future).prompt_logprobs
            assert scoring is not None
            return scoring.logprobs, scoring.ranked
        finally:
            self.count -= 1
            self._inbox.put(lambda: self._cancel_score(future))

    # -- in the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._work()
            except BaseException as e:  # a Rust panic is not an Exception
                log.exception("the engine failed; running requests are lost")
                self.engine.reset()
                self._deliver_step()
                _deliver({handle: [_engine_error(e)] for handle in self._handles.values()})
                self._handles.clear()
                self._settle_scores([(future, None, _engine_error(e)) for future in self._scores])
        self._deliver_step()

    def _work(self) -> None:
        wait = self.engine.idle
        if wait:
            self._deliver_step()
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False
        if self.engine.idle:
            return
        # A step's tokens are delivered when the next forward pass, which releases the GIL, is about to start.
        outbox: dict[RequestHandle, list[TokenDelta | Exception]] = {}
        for sequence in self.engine.step(self._deliver_step):
            if (handle := self._handles.get(sequence.request)) is not None:
                outbox.setdefault(handle, []).append(self._delta(handle, sequence))
        if self._scores:
            self._settle_scores([(future, request, None) for future, request in self._scores.items() if request.done])
        for handle in outbox:
            handle.cached_tokens = sum(r.cached_tokens for r in handle.requests)
            for request in [r for r in handle.requests if r.done and r in self._handles]:
                del self._handles[request]
                self.engine.release(request)
        self._outbox = outbox

    def _deliver_step(self) -> None:
        _deliver(self._outbox)
        self._outbox = {}

    def _submit(self, handle: RequestHandle) -> None:
        error: Exception | None = None
        try:
            for prompt in handle.prompts:
                request = self.engine.submit(prompt, handle.params)
                handle.requests.append(request)
                self._handles[request] = handle
        except UserError as e:
            error = e
        except BaseException as e:  # fails this request only
            log.exception("the engine could not accept a request")
            error = _engine_error(e)
        if error is not None:
            self._cancel(handle)
        _call(handle.loop, lambda: _settle(handle.accepted, None, error))

    def _cancel(self, handle: RequestHandle) -> None:
        for request in handle.requests:
            if self._handles.pop(request, None) is not None:
                self.engine.cancel(request)

    def _submit_score(self, prompt: list[int], top: int, future: "asyncio.Future[Request]") -> None:
        if future.cancelled():
            return
        error: Exception
        try:
            self._scores[future] = self.engine.score(prompt, top)
            return
        except UserError as e:
            error = e
        except BaseException as e:
            log.exception("the engine could not accept a text")
            error = _engine_error(e)
        self._settle_scores([(future, None, error)])

    def _settle_scores(self, results: "list[tuple[asyncio.Future[Request], Request | None, Exception | None]]") -> None:
        for future, request, error in results:
            self._scores.pop(future, None)
            _call(future.get_loop(), partial(_settle, future, request, error))

    def _cancel_score(self, future: "asyncio.Future[Request]") -> None:
        if (request := self._scores.pop(future, None)) is not None:
            self.engine.cancel(request)

    def _delta(self, handle: RequestHandle, sequence: Sequence) -> TokenDelta:
        text = self.engine.detokenizer(sequence)
        reasoning, content = ("", text.text) if handle.raw else (text.reasoning, text.content)
        num_reasoning, num_content, num_tokens = handle.sent.get(sequence, (0, 0, 0))
        handle.sent[sequence] = len(reasoning), len(content), len(sequence.tokens)
        index = handle.requests.index(sequence.request) * handle.params.n + sequence.index
        return TokenDelta(
            index, reasoning[num_reasoning:], content[num_content:], sequence.tokens[num_tokens:],
            sequence.logprobs[num_tokens:], sequence.top_logprobs[num_tokens:], sequence.finish_reason,
            max(0, text.reasoning_end - num_tokens), text.reasoning_tokens,
        )  # fmt: skip


def _engine_error(error: BaseException) -> EngineError:
    return EngineError(f"{type(error).__name__}: {error}")


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _deliver(outbox: "dict[RequestHandle, list[TokenDelta | Exception]]") -> None:
    """Deliver a step's deltas with one call a loop: to wake a loop costs a system call."""
    for loop in {handle.loop for handle in outbox}:

        def put(loop: asyncio.AbstractEventLoop = loop) -> None:
            for handle, deltas in outbox.items():
                if handle.loop is loop:
                    handle.put(deltas)

        _call(loop, put)


def _call(loop: asyncio.AbstractEventLoop, do: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(do)
    except RuntimeError:  # the loop is closed, and with it every awaiter
        log.debug("a result came after the event loop had closed")
