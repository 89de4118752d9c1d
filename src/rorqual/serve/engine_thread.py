"""Run the engine in a thread of its own, with requests from asyncio."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rorqual.engine import Engine
from rorqual.engine.outputs import TokenDelta
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sequence import Request, Sequence
from rorqual.errors import UserError
from rorqual.serve.api_errors import ApiError
from rorqual.serve.request_handle import RequestHandle

log = logging.getLogger("rorqual.serve")
T = TypeVar("T")
Deltas = list[TokenDelta | Exception]


class EngineThread:
    """Accepts the sequences that the engine decodes at a time and max_queue more; beyond that the queue is full (429).

    After an error of the engine it goes on with an empty one; where that fails, it refuses requests (503).
    """

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.engine, self.limit = engine, engine.capacity + max_queue
        self.count = 0  # sequences not closed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[Sequence, tuple[RequestHandle, int]] = {}  # not finished, and its number among the choices
        self._scores: dict[asyncio.Future[Request], Request] = {}
        self._outbox: dict[RequestHandle, Deltas] = {}  # of the last step, not delivered yet
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = self._failed = False

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step."""
        self._stopping = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._failed

    # -- from asyncio

    async def open(self, handle: RequestHandle) -> None:
        """Submit a handle's prompts, and wait until the engine has accepted them; then `close` must follow.

        Raises UserError for an invalid prompt, ApiError if the queue is full or the engine fails.
        """
        self._count(handle.num_sequences)
        self._inbox.put(lambda: self._submit(handle))
        try:
            await handle.accepted
        except BaseException:
            self.close(handle)
            raise

    def close(self, handle: RequestHandle) -> None:
        self.count -= handle.num_sequences
        self._inbox.put(lambda: self._cancel(handle))

    async def score(self, prompt: list[int], top: int, adapter: str | None = None) -> PromptLogprobs:
        """A prompt's log-probabilities, and its most probable tokens; counts as one sequence. Raises as `open` does."""
        self._count(1)
        future: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        try:
            self._inbox.put(lambda: self._submit_score(prompt, top, adapter, future))
            found = (await future).prompt_logprobs
            assert found is not None
            return found
        finally:
            self.count -= 1
            self._inbox.put(lambda: self._cancel_score(future))

    def _count(self, sequences: int) -> None:
        if not self.alive:
            raise ApiError(503, "the engine has stopped; its log says why")
        if self.count + sequences > self.limit:
            raise ApiError(429, "the server's queue is full; retry later", code="queue_full", Retry_After="1")
        self.count += sequences

    # -- in the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._work()
            except BaseException as e:  # a Rust panic is not an Exception
                log.exception("the engine failed; running requests are lost")
                self._deliver_step()
                _deliver({handle: [_engine_failed(e)] for handle, _ in self._running.values()})
                self._running.clear()
                self._settle_scores([(future, _engine_failed(e)) for future in self._scores])
                try:
                    self.engine.reset()
                except Exception:
                    log.exception("the engine cannot go on")
                    self._failed = True
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
        outbox: dict[RequestHandle, Deltas] = {}
        for sequence in self.engine.step(self._deliver_step):
            if (running := self._running.get(sequence)) is not None:
                handle, index = running
                outbox.setdefault(handle, []).append(sequence.take(index))
                if sequence.finish_reason is not None:
                    del self._running[sequence]
        if self._scores:
            self._settle_scores([(future, request) for future, request in self._scores.items() if request.done])
        self._outbox = outbox

    def _deliver_step(self) -> None:
        _deliver(self._outbox)
        self._outbox = {}

    def _submit(self, handle: RequestHandle) -> None:
        result: Exception | None = None
        try:
            for i, prompt in enumerate(handle.prompts):
                request = self.engine.submit(prompt, handle.params)
                handle.requests.append(request)
                for sequence in request.sequences:
                    self._running[sequence] = handle, i * handle.params.n + sequence.index
        except UserError as e:
            result = e
        except BaseException as e:  # fails this request only
            log.exception("the engine could not accept a request")
            result = _engine_failed(e)
        if result is not None:
            self._cancel(handle)
        _call(handle.loop, lambda: _settle(handle.accepted, result))

    def _cancel(self, handle: RequestHandle) -> None:
        for request in handle.requests:
            running = [sequence for sequence in request.sequences if self._running.pop(sequence, None) is not None]
            if running:
                self.engine.cancel(request)

    def _submit_score(
        self, prompt: list[int], top: int, adapter: str | None, future: "asyncio.Future[Request]"
    ) -> None:
        if future.cancelled():
            return
        try:
            self._scores[future] = self.engine.score(prompt, top, adapter)
        except UserError as e:
            self._settle_scores([(future, e)])
        except BaseException as e:
            log.exception("the engine could not accept a text")
            self._settle_scores([(future, _engine_failed(e))])

    def _settle_scores(self, results: "list[tuple[asyncio.Future[Request], Request | Exception]]") -> None:
        for future, result in results:
            self._scores.pop(future, None)
            _call(future.get_loop(), partial(_settle, future, result))

    def _cancel_score(self, future: "asyncio.Future[Request]") -> None:
        if (request := self._scores.pop(future, None)) is not None:
            self.engine.cancel(request)


def _engine_failed(error: BaseException) -> ApiError:
    return ApiError(500, f"the engine failed ({type(error).__name__}: {error}); send the request again")


def _settle(future: "asyncio.Future[T]", result: T | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _deliver(outbox: dict[RequestHandle, Deltas]) -> None:
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
