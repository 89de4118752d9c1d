"""One model behind the routes: prompts into tokens, tickets of the worker, their pieces timed."""

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from rorqual.data.chat_messages import read_messages
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.special_tokens import encode
from rorqual.engine import Engine, Grammar, SamplingParams
from rorqual.engine.block_manager import BLOCK
from rorqual.engine.prompt_logprobs import Ranked
from rorqual.errors import UserError
from rorqual.serve.api_errors import ApiError
from rorqual.serve.background import kind_of, run_in_background
from rorqual.serve.engine_thread import EngineError, EngineThread, QueueFull, RequestHandle, TokenDelta
from rorqual.serve.prometheus import Metrics
from rorqual.serve.protocol import Message, Sampling, Tool
from rorqual.serve.responses import Vocabulary
from rorqual.unicode_checks import whole

FORM_MOST = 1 << 17  # characters of a schema or grammar: to compile one of twice the size takes twenty seconds


@dataclass(frozen=True)
class Options:
    """name: what clients call the model. keys: who may ask (none: everybody). max_queue: samples that may wait.
    host: the address it listens on. origins: of pages that may ask, beside its own and this machine's.
    """

    name: str
    keys: tuple[str, ...] = ()
    max_queue: int = 256
    timeout: float = 600.0  # seconds a request may take
    max_body: int = 8 << 20  # bytes
    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()


class ModelService:
    """One model behind the routes; `recommended` is how it samples where a request does not say."""

    def __init__(self, engine: Engine, recommended: SamplingParams, options: Options) -> None:
        self.engine, self.recommended, self.options = engine, recommended, options
        self.context = context_of(engine)
        self.longest: int | None = engine.model.released.sampling.get("max_tokens")  # of an answer, says the release
        self.worker = EngineThread(engine, options.max_queue)
        self.metrics = Metrics(engine)
        self.vocabulary = Vocabulary(engine)
        self.template = str(getattr(engine.tokenizer, "chat_template", None) or "")
        self.chat = ChatTemplate(engine.tokenizer)

    # -- prompts

    async def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: list[Tool],
        generation: bool | None = None,
        unfinished: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation. generation: an answer is to follow; None: unless it goes on with the last message
        (unfinished). settings: the template's own.
        """
        if not self.template:
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        if unfinished and generation:
            name = "add_generation_prompt"
            raise ApiError(
                400, f"{name}: true begins a new message, but the last is to be continued; leave it out", name
            )
        # These are the server's own to give: with a template of its own, a request could run for ever.
        known = inspect.signature(self.engine.tokenizer.apply_chat_template).parameters.keys()
        reserved = (settings or {}).keys() & {*known, "conversations", "messages", "self"}
        if reserved:
            name = "chat_template_kwargs"
            raise ApiError(400, f"{name}: {min(reserved)!r} is not for a template; leave it out", name)

        def render() -> list[int]:
            said = read_messages([dict(m) for m in messages], "messages")
            described = [t.for_template() for t in tools] or None
            text = self.chat.render(said, described, generation is not False, unfinished, settings)
            return encode(text, self.engine.tokenizer)

        try:
            return await run_in_background(render, kind_of(sum(len(str(m.content)) for m in messages)))
        except UserError as e:
            place, said, _ = str(e).partition(": ")
            raise ApiError(400, str(e), place if said and place.startswith("messages") else "messages") from e

    @cached_property
    def marks(self) -> dict[str, int]:
        """Tokens that stand for a text as a whole."""
        return {token.content: number for number, token in self.engine.tokenizer.added_tokens_decoder.items()}

    async def encode(self, text: str, special: bool) -> list[int]:
        """special: with what the tokenizer puts before a text, unless it is there."""
        if not whole(text):
            raise ApiError(400, "prompt holds half a character (a lone surrogate); send whole ones", "prompt")
        return await run_in_background(partial(self.engine.encode, text, special), kind_of(len(text)))

    async def text(self, tokens: Sequence[int]) -> str:
        """What tokens of a prompt read, without the names of special ones."""
        return await self.decode([t for t in tokens if t not in self.vocabulary.speller.hidden])

    async def decode(self, tokens: list[int]) -> str:
        """In a batch of one: alone, it keeps the interpreter to itself."""
        backend = self.engine.tokenizer.backend_tokenizer
        work = partial(backend.decode_batch, [tokens], skip_special_tokens=False)
        return (await run_in_background(work, kind_of(len(tokens))))[0]

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        size = self.engine.model.config.vocab_size
        if not all(0 <= t < size for t in tokens):
            raise ApiError(400, f"{param}: token ids must be from 0 to {size - 1}", param)

    # -- answers

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.name:
            message = f"the model {name!r} does not exist; this server has {self.options.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_count(self, samples: int) -> None:
        """Before anything is done about so many answers."""
        if samples > self.worker.limit:
            raise ApiError(
                400, f"{samples} answers are more than the {self.worker.limit} this server takes at once", "n"
            )

    def check_prompt(self, prompt: list[int], param: str, wanted: int | None) -> None:
        if not prompt:
            raise ApiError(400, f"{param} is empty; give at least one token", param)
        if len(prompt) >= self.context or len(prompt) + (wanted or 0) > self.context:
            asked = f" and asks for {wanted} more" if wanted else ""
            message = f"{param} has {len(prompt)} tokens{asked}, but the context holds {self.context}; shorten it"
            raise ApiError(400, message, param, "context_length_exceeded")

    def sampling(
        self, body: Sampling, prompts: list[list[int]], wanted: int | None, logprobs: int, grammar: Grammar | None
    ) -> SamplingParams:
        """`wanted`: tokens an answer may have; None: as many as the release says, else as there is room for."""
        room = self.context - max(map(len, prompts))
        try:
            params = body.params(self.recommended, wanted or min(self.longest or room, room), logprobs, grammar)
            return params if wanted is None else replace(params, max_length=None)
        except UserError as e:
            raise ApiError(400, str(e)) from e

    @contextlib.asynccontextmanager
    async def running(
        self, prompts: list[list[int]], params: SamplingParams, raw: bool
    ) -> AsyncIterator[RequestHandle]:
        ticket = await self.admit(prompts, params, raw)
        try:
            yield ticket
        finally:
            self.worker.close(ticket)

    async def admit(self, prompts: list[list[int]], params: SamplingParams, raw: bool) -> RequestHandle:
        """A ticket that the engine has accepted; must be closed."""
        if params.grammar is not None:
            if len(params.grammar.text) > FORM_MOST:
                raise ApiError(400, f"the form of the answer has more than {FORM_MOST} characters; make it smaller")
            try:
                compiled = await run_in_background(partial(self.engine.compile, params.grammar), "grammar")
            except UserError as e:
                raise ApiError(400, str(e)) from e
            params = replace(params, grammar=compiled)
        try:
            ticket = self.worker.open(prompts, params, raw)
        except QueueFull:
            raise busy() from None
        try:
            await ticket.accepted
        except BaseException as e:
            self.worker.close(ticket)
            if isinstance(e, UserError):
                raise ApiError(400, str(e)) from e
            if isinstance(e, EngineError):
                raise failed(e) from e
            raise
        return ticket

    async def pieces(self, ticket: RequestHandle, started: float) -> AsyncIterator[TokenDelta]:
        """A ticket's pieces, timed; raises ApiError where it takes too long or the engine fails."""
        before: float | None = None
        left = ticket.samples
        alarm = ticket.loop.call_later(self.left(started), ticket.put, [self._late()])
        try:
            while left:
                for piece in await ticket.fetch():
                    if isinstance(piece, Exception):
                        raise piece
                    now = time.monotonic()
                    if before is None:
                        self.metrics.first.observe(now - started)
                    elif ticket.samples == 1 and piece.tokens:
                        self.metrics.between.observe(now - before, len(piece.tokens))
                    before = now
                    left -= piece.finish is not None
                    yield piece
        except EngineError as e:
            raise failed(e) from e
        finally:
            alarm.cancel()
        self.metrics.whole.observe(time.monotonic() - started)

    async def score(self, prompt: list[int], top: int, started: float) -> tuple[list[float | None], list[Ranked]]:
        """A prompt's own log-probabilities."""
        try:
            async with asyncio.timeout(self.left(started)):
                return await self.worker.score(prompt, top)
        except QueueFull:
            raise busy() from None
        except TimeoutError:
            raise self._late() from None
        except EngineError as e:
            raise failed(e) from e
        except UserError as e:
            raise ApiError(400, str(e), "prompt") from e

    def left(self, started: float) -> float:
        """Seconds that a request which came then may still take."""
        return max(0.0, started + self.options.timeout - time.monotonic())

    def _late(self) -> ApiError:
        return ApiError(504, f"the answer took longer than {self.options.timeout:g} seconds")


def context_of(engine: Engine) -> int:
    """Tokens a prompt and its answer may have: as many as the model knows places for and the cache has room for."""
    config = engine.model.config
    if engine.kv_cache_bytes is None:
        return config.max_position_embeddings
    blocks = engine.kv_cache_bytes // engine.block_bytes
    return min(config.max_position_embeddings, max(0, blocks - 2) * BLOCK)


def busy() -> ApiError:
    return ApiError(429, "the server is busy and its queue is full; try again soon", code="queue_full", Retry_After="1")


def failed(error: EngineError) -> ApiError:
    return ApiError(500, f"the engine failed ({error}); send the request again")
