"""One model behind the routes: prompts into tokens, tickets of the worker, their pieces timed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.serve.answers import Vocabulary
from rorqual.serve.errors import ApiError
from rorqual.serve.metrics import Metrics
from rorqual.serve.protocol import Sampling, Tool
from rorqual.serve.tools import told
from rorqual.serve.worker import Busy, Failed, Piece, Ticket, Worker


@dataclass(frozen=True)
class Options:
    """name: what clients call the model. keys: who may ask (none: everybody). waiting: samples that may queue."""

    name: str
    keys: tuple[str, ...] = ()
    waiting: int = 256
    timeout: float = 600.0  # seconds a request may take
    max_body: int = 8 << 20  # bytes


class Service:
    """One model behind the routes; `recommended` is how it samples where a request does not say."""

    def __init__(self, engine: Engine, recommended: SamplingParams, options: Options) -> None:
        self.engine, self.recommended, self.options = engine, recommended, options
        self.context = engine.model.config.max_position_embeddings
        self.worker = Worker(engine, options.waiting)
        self.metrics = Metrics(engine)
        self.vocabulary = Vocabulary(engine)
        self.template = str(getattr(engine.tokenizer, "chat_template", None) or "")
        self._tokenizing = asyncio.Lock()

    # -- prompts

    async def chat_prompt(
        self, messages: Sequence[Any], tools: list[Tool] | None, add: bool = True, extra: dict[str, Any] | None = None
    ) -> list[int]:
        if not self.template:
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        said = [m.for_template() for m in messages]
        described = None
        if tools:
            said = told(said, tools, self.template)
            described = [t.model_dump(exclude_none=True) for t in tools]

        def render() -> list[int]:
            text = self.engine.tokenizer.apply_chat_template(
                said, tools=described, tokenize=False, add_generation_prompt=add, **(extra or {})
            )
            return self.engine.tokenizer(text, add_special_tokens=False).input_ids

        try:
            return await self._aside(render)
        except Exception as e:  # a template raises what it likes about messages that it does not expect
            raise ApiError(400, f"the model's chat template refuses these messages: {e}", param="messages") from e

    async def encode(self, text: str) -> list[int]:
        return await self._aside(lambda: self.engine.tokenizer(text, add_special_tokens=False).input_ids)

    async def _aside(self, work: Callable[[], Any]) -> Any:
        """In a thread: a long prompt takes the tokenizer a while. One at a time, since it is not made for more."""
        async with self._tokenizing:
            return await asyncio.to_thread(work)

    # -- answers

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.name:
            message = f"the model {name!r} does not exist; this server has {self.options.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_prompt(self, prompt: list[int], param: str, wanted: int | None) -> None:
        if not prompt:
            raise ApiError(400, f"{param} is empty; give at least one token", param)
        if len(prompt) >= self.context or len(prompt) + (wanted or 0) > self.context:
            asked = f" and asks for {wanted} more" if wanted else ""
            message = (
                f"{param} has {len(prompt)} tokens{asked}, but the model's context holds {self.context}; shorten it"
            )
            raise ApiError(400, message, param, "context_length_exceeded")

    def sampling(self, body: Sampling, max_tokens: int | None, logprobs: int, grammar: Any) -> SamplingParams:
        try:
            return body.params(self.recommended, max_tokens or self.context, logprobs, grammar)
        except UserError as e:
            raise ApiError(400, str(e)) from e

    @contextlib.asynccontextmanager
    async def running(self, prompts: list[list[int]], params: SamplingParams, raw: bool) -> AsyncIterator[Ticket]:
        ticket = await self.admit(prompts, params, raw)
        try:
            yield ticket
        finally:
            self.worker.close(ticket)

    async def admit(self, prompts: list[list[int]], params: SamplingParams, raw: bool) -> Ticket:
        """A ticket that the engine has accepted; must be closed."""
        try:
            ticket = self.worker.open(prompts, params, raw)
        except Busy:
            if len(prompts) * params.n > self.worker.limit:
                raise ApiError(
                    400, f"{len(prompts) * params.n} answers are more than this server takes at once"
                ) from None
            raise ApiError(
                429, "the server is busy and its queue is full; try again soon", code="queue_full", Retry_After="1"
            ) from None
        try:
            await ticket.accepted
        except UserError as e:
            self.worker.close(ticket)
            raise ApiError(400, str(e)) from e
        except BaseException:
            self.worker.close(ticket)
            raise
        return ticket

    async def pieces(self, ticket: Ticket, started: float) -> AsyncIterator[Piece]:
        """A ticket's pieces, timed; raises ApiError where it takes too long or the engine fails."""
        before: float | None = None
        iterator = aiter(ticket)
        while True:
            left = started + self.options.timeout - time.monotonic()
            try:
                piece = await asyncio.wait_for(anext(iterator), max(0.0, left))
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise ApiError(504, f"the answer took longer than {self.options.timeout:g} seconds") from None
            except Failed as e:
                raise ApiError(500, f"the engine failed ({e}); send the request again") from e
            now = time.monotonic()
            if before is None:
                self.metrics.first.observe(now - started)
            elif ticket.samples == 1:
                self.metrics.between.observe(now - before)
            before = now
            yield piece
        self.metrics.whole.observe(time.monotonic() - started)
