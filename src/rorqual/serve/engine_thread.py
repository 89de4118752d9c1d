"""The engine in a thread of its own, and requests to it from asyncio."""

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
    """The engine failed; the request can be sent again."""


@dataclass
class TokenDelta:
    """What one sample has grown by; `finish` comes with the last."""

    index: int  # prompt's number · n + sample's number
    reasoning: str
    content: str
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None
    thoughts: int  # of the tokens, from the first on, that belong to the thinking
    reasoning_tokens: int  # so far, as far as there is text of them


class RequestHandle:
    """Prompts on their way, with one setting for all. Its pieces are to be fetched until every sample has finished.

    raw: the text as it is, thinking and answer in one. Must be closed (EngineThread.close) in any case.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, raw: bool) -> None:
        self.prompts, self.params, self.raw = prompts, params, raw
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()  # UserError for a prompt that cannot be
        self._come: list[TokenDelta | Exception] = []
        self._awaited: asyncio.Future[None] | None = None
        self.requests: list[Request] = []
        self.said: dict[Sequence, tuple[int, int, int]] = {}  # characters and tokens handed on
        self.cached = 0  # tokens of the prompts found in the cache

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.params.n

    def put(self, pieces: list[TokenDelta | Exception]) -> None:
        """In the loop's thread. An exception is raised in whoever reads the pieces."""
        self._come += pieces
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def fetch(self) -> list[TokenDelta | Exception]:
        """What has come since the last time, as soon as there is anything. A queue would take several times as long."""
        if not self._come:
            self._awaited = self.loop.create_future()
            await self._awaited
        come, self._come = self._come, []
        return come


class EngineThread:
    """`open` takes samples as far as the engine's slots and `waiting` more go; beyond that it raises QueueFull."""

    def __init__(self, engine: Engine, waiting: int) -> None:
        self.engine, self.limit = engine, engine.max_num_seqs + waiting
        self.count = 0  # samples under way
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[Request, RequestHandle] = {}
        self._scores: dict[asyncio.Future[Request], Request] = {}
        self._grown: dict[RequestHandle, list[TokenDelta | Exception]] = {}  # by the last step, not handed on yet
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
        ticket = RequestHandle(prompts, params, raw)
        if self.count + ticket.samples > self.limit:
            raise QueueFull
        self.count += ticket.samples
        self._inbox.put(lambda: self._submit(ticket))
        return ticket

    def close(self, ticket: RequestHandle) -> None:
        """Once for every ticket: what still runs of it is cancelled, its blocks are free before the next step."""
        self.count -= ticket.samples
        self._inbox.put(lambda: self._cancel(ticket))

    async def score(self, prompt: list[int], top: int) -> tuple[list[float | None], list[Ranked]]:
        """Of a prompt the log-probabilities, and the most probable tokens; it takes a place as a sample does.

        Raises QueueFull, UserError for a prompt that cannot be, EngineError.
        """
        if self.count >= self.limit:
            raise QueueFull
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Request] = loop.create_future()
        self.count += 1
        try:
            self._inbox.put(lambda: self._submit_score(prompt, top, answer))
            scoring = (await answer).prompt_logprobs
            assert scoring is not None
            return scoring.logprobs, scoring.ranked
        finally:
            self.count -= 1
            self._inbox.put(lambda: self._cancel_score(answer))

    # -- in the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._work()
            except BaseException as e:  # what Rust panics with is no Exception
                log.exception("the engine failed; what was under way is lost")
                self.engine.reset()
                self._hand_on()
                _hand({ticket: [_failed(e)] for ticket in self._tickets.values()})
                self._tickets.clear()
                self._settle_scores([(answer, None, _failed(e)) for answer in self._scores])
        self._hand_on()

    def _work(self) -> None:
        wait = self.engine.idle
        if wait:
            self._hand_on()
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False
        if self.engine.idle:
            return
        # The loop sends a step's tokens while the next is computed: before, both threads would want the interpreter.
        grown: dict[RequestHandle, list[TokenDelta | Exception]] = {}
        for sample in self.engine.step(self._hand_on):
            if (ticket := self._tickets.get(sample.request)) is not None:
                grown.setdefault(ticket, []).append(self._piece(ticket, sample))
        if self._scores:
            self._settle_scores([(answer, request, None) for answer, request in self._scores.items() if request.done])
        for ticket in grown:
            ticket.cached = sum(r.cached_tokens for r in ticket.requests)
            for request in [r for r in ticket.requests if r.done and r in self._tickets]:
                del self._tickets[request]
                self.engine.release(request)
        self._grown = grown

    def _hand_on(self) -> None:
        _hand(self._grown)
        self._grown = {}

    def _submit(self, ticket: RequestHandle) -> None:
        error: Exception | None = None
        try:
            for prompt in ticket.prompts:
                request = self.engine.submit(prompt, ticket.params)
                ticket.requests.append(request)
                self._tickets[request] = ticket
        except UserError as e:
            error = e
        except BaseException as e:  # its own trouble: the others go on
            log.exception("the engine could not take a request in")
            error = _failed(e)
        if error is not None:
            self._cancel(ticket)
        _call(ticket.loop, lambda: _settle(ticket.accepted, None, error))

    def _cancel(self, ticket: RequestHandle) -> None:
        for request in ticket.requests:
            if self._tickets.pop(request, None) is not None:
                self.engine.cancel(request)

    def _submit_score(self, prompt: list[int], top: int, answer: "asyncio.Future[Request]") -> None:
        if answer.cancelled():
            return
        error: Exception
        try:
            self._scores[answer] = self.engine.score(prompt, top)
            return
        except UserError as e:
            error = e
        except BaseException as e:
            log.exception("the engine could not take a text in")
            error = _failed(e)
        self._settle_scores([(answer, None, error)])

    def _settle_scores(self, found: "list[tuple[asyncio.Future[Request], Request | None, Exception | None]]") -> None:
        for answer, request, error in found:
            self._scores.pop(answer, None)
            _call(answer.get_loop(), partial(_settle, answer, request, error))

    def _cancel_score(self, answer: "asyncio.Future[Request]") -> None:
        if (request := self._scores.pop(answer, None)) is not None:
            self.engine.cancel(request)

    def _piece(self, ticket: RequestHandle, sample: Sequence) -> TokenDelta:
        text = self.engine.detokenizer(sample)
        reasoning, content = ("", text.text) if ticket.raw else (text.reasoning, text.content)
        thought, answered, made = ticket.said.get(sample, (0, 0, 0))
        ticket.said[sample] = len(reasoning), len(content), len(sample.tokens)
        index = ticket.requests.index(sample.request) * ticket.params.n + sample.index
        return TokenDelta(
            index, reasoning[thought:], content[answered:], sample.tokens[made:], sample.logprobs[made:],
            sample.top_logprobs[made:], sample.finish_reason, max(0, text.thoughts - made), text.reasoning_tokens,
        )  # fmt: skip


def _failed(error: BaseException) -> EngineError:
    return EngineError(f"{type(error).__name__}: {error}")


def _settle(answer: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def _hand(grown: "dict[RequestHandle, list[TokenDelta | Exception]]") -> None:
    """All that a step has made at once: to wake a loop costs a system call."""
    for loop in {ticket.loop for ticket in grown}:

        def put(loop: asyncio.AbstractEventLoop = loop) -> None:
            for ticket, pieces in grown.items():
                if ticket.loop is loop:
                    ticket.put(pieces)

        _call(loop, put)


def _call(loop: asyncio.AbstractEventLoop, do: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(do)
    except RuntimeError:  # the loop has ended, and with it whoever waited
        log.debug("an answer came after the end")
