"""A submitted request as asyncio sees it: new tokens as they come, timed for the metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from rorqual.engine import SamplingParams
from rorqual.engine.outputs import TokenDelta
from rorqual.engine.sequence import Request
from rorqual.serve.api_errors import ApiError
from rorqual.serve.prometheus import Metrics


class RequestHandle:
    """Prompts with common sampling parameters; read `deltas` until every sequence has finished, and `close` it once, in
    any case: what still runs is cancelled, and its blocks are free before the next step.

    started: when the request arrived, in time.monotonic's seconds; it may take `timeout` seconds.
    """

    def __init__(
        self, prompts: list[list[int]], params: SamplingParams, started: float, timeout: float, metrics: Metrics,
        close: "Callable[[RequestHandle], None]",
    ) -> None:  # fmt: skip
        self.prompts, self.params = prompts, params
        self.num_sequences = len(prompts) * params.n
        self.requests: list[Request] = []  # the engine's, one a prompt
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()  # an exception where the engine refuses it
        self._started, self._timeout, self._metrics, self._close = started, timeout, metrics, close
        self._deltas: list[TokenDelta | Exception] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, so far."""
        return sum(request.cached_tokens for request in self.requests)

    def put(self, deltas: Sequence[TokenDelta | Exception]) -> None:
        """Add deltas, in the loop's thread. An exception is raised where the deltas are read."""
        self._deltas += deltas
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def deltas(self) -> AsyncIterator[TokenDelta]:
        """New tokens, as they come. Raises ApiError on a time-out and if the engine fails."""
        before: float | None = None
        left = self.num_sequences
        rest = max(0.0, self._started + self._timeout - time.monotonic())
        alarm = self.loop.call_later(rest, self.put, [timed_out(self._timeout)])
        try:
            while left:
                if not self._deltas:  # an asyncio.Queue would take several times as long
                    self._waiter = self.loop.create_future()
                    await self._waiter
                deltas, self._deltas = self._deltas, []
                for delta in deltas:
                    if isinstance(delta, Exception):
                        raise delta
                    now = time.monotonic()
                    if before is None:
                        self._metrics.first.observe(now - self._started)
                    elif self.num_sequences == 1 and delta.tokens:
                        self._metrics.between.observe(now - before, len(delta.tokens))
                    before = now
                    left -= delta.finish_reason is not None
                    yield delta
        finally:
            alarm.cancel()
        self._metrics.observe_request(time.monotonic() - self._started)

    def close(self) -> None:
        self._close(self)


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds:g} seconds")
