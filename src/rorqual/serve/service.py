"""The model behind the routes: prompts to tokens, requests to the engine thread, and their timing."""

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from rorqual.data.chat_messages import read_messages
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.special_tokens import encode
from rorqual.engine import Engine, Grammar, SamplingParams
from rorqual.engine.block_manager import BLOCK
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.errors import UserError
from rorqual.serve.api_errors import ApiError
from rorqual.serve.background import kind_of, run_in_background
from rorqual.serve.engine_thread import EngineThread
from rorqual.serve.prometheus import Metrics
from rorqual.serve.protocol import Message, Sampling, Tool
from rorqual.serve.request_handle import RequestHandle, timed_out
from rorqual.serve.responses import Vocabulary
from rorqual.unicode_checks import whole

MAX_GRAMMAR_CHARACTERS = 1 << 17  # of a schema or grammar: one of twice the size takes twenty seconds to compile


MIN_CONTEXT = 64  # tokens that the KV cache must hold for a prompt and its answer


@dataclass(frozen=True)
class Options:
    """name: the model's name in the API. keys: API keys (none: no authentication). max_queue: sequences that may wait.
    host: the address to listen on. origins: web pages allowed besides the server's own and this machine's.
    """

    name: str
    keys: tuple[str, ...] = ()
    max_queue: int = 256
    timeout: float = 600.0  # seconds a request may take
    max_body: int = 8 << 20  # bytes
    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()


class ModelService:
    """The model behind the routes; `default_params`: sampling parameters where a request gives none.

    Raises UserError if the KV cache is too small.
    """

    def __init__(self, engine: Engine, default_params: SamplingParams, options: Options) -> None:
        self.engine, self.default_params, self.options = engine, default_params, options
        self.context = context_of(engine)
        if self.context < MIN_CONTEXT:
            raise UserError(
                f"the KV cache of {engine.kv_cache_bytes} bytes holds {self.context} tokens; "
                f"raise --cache-gb until it holds at least {MIN_CONTEXT}"
            )
        self.max_answer_tokens: int | None = engine.model.released.sampling.get("max_tokens")  # of the release
        self.engine_thread = EngineThread(engine, options.max_queue)
        self.metrics = Metrics(engine)
        self.vocabulary = Vocabulary(engine)
        self.tokenizer = engine.require_tokenizer()
        self.template = str(getattr(self.tokenizer, "chat_template", None) or "")
        self.chat = ChatTemplate(self.tokenizer)

    # -- prompts

    async def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: list[Tool],
        generation: bool | None = None,
        unfinished: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. generation: add the generation prompt; None: unless the answer continues the
        last message (unfinished). settings: chat_template_kwargs. Raises ApiError.
        """
        if not self.template:
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        if unfinished and generation:
            name = "add_generation_prompt"
            raise ApiError(
                400, f"{name}: true starts a new message, but the last is to be continued; leave it out", name
            )
        # Arguments that the server sets: with a template of its own, a request could run for ever.
        known = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys()
        reserved = (settings or {}).keys() & {*known, "conversations", "messages", "self"}
        if reserved:
            name = "chat_template_kwargs"
            raise ApiError(400, f"{name}: {min(reserved)!r} is not for a template; leave it out", name)

        def render() -> list[int]:
            conversation = read_messages([dict(m) for m in messages], "messages")
            described = [t.for_template() for t in tools] or None
            text = self.chat.render(conversation, described, generation is not False, unfinished, settings)
            return encode(text, self.tokenizer)

        try:
            return await run_in_background(render, kind_of(sum(len(str(m.content)) for m in messages)))
        except UserError as e:
            place, colon, _ = str(e).partition(": ")
            raise ApiError(400, str(e), place if colon and place.startswith("messages") else "messages") from e

    @cached_property
    def marks(self) -> dict[str, int]:
        """Added tokens: text → id."""
        return {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}

    async def encode(self, text: str, special: bool) -> list[int]:
        """A text's token ids. special: prepend the tokenizer's BOS, unless the text starts with it."""
        if not whole(text):
            raise ApiError(400, "prompt holds a lone surrogate (half a character); send whole ones", "prompt")
        return await run_in_background(partial(self.engine.encode, text, special), kind_of(len(text)))

    async def text(self, tokens: Sequence[int]) -> str:
        """The text of a prompt's tokens, without special tokens."""
        return await self.decode([t for t in tokens if t not in self.vocabulary.decoder.hidden])

    async def decode(self, tokens: list[int]) -> str:
        """The text of tokens, as a batch of one: only decode_batch releases the GIL."""
        backend = self.tokenizer.backend_tokenizer
        work = partial(backend.decode_batch, [tokens], skip_special_tokens=False)
        return (await run_in_background(work, kind_of(len(tokens))))[0]

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        size = self.engine.model.config.vocab_size
        if not all(0 <= t < size for t in tokens):
            raise ApiError(400, f"{param}: token ids must be from 0 to {size - 1}", param)

    # -- answers

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            message = f"the model {name!r} does not exist; this server has {', '.join(map(repr, self.names))}"
            raise ApiError(404, message, "model", "model_not_found")

    @cached_property
    def names(self) -> list[str]:
        """What a request's `model` may be: the model, then adapters."""
        adapters = self.engine.adapters
        return [self.options.name, *([] if adapters is None else sorted(adapters.names))]

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request's `model` names, if it is one."""
        return None if name == self.options.name else name

    def check_count(self, answers: int) -> None:
        """Raises ApiError for more answers than can ever be accepted."""
        if answers > self.engine_thread.limit:
            limit = self.engine_thread.limit
            raise ApiError(400, f"{answers} answers are more than the {limit} that this server accepts at once", "n")

    def check_prompt(self, prompt: list[int], param: str, max_tokens: int | None) -> None:
        if not prompt:
            raise ApiError(400, f"{param} is empty; give at least one token", param)
        if len(prompt) >= self.context or len(prompt) + (max_tokens or 0) > self.context:
            answer = f" and asks for {max_tokens} more" if max_tokens else ""
            message = f"{param} has {len(prompt)} tokens{answer}, but the context holds {self.context}; shorten it"
            raise ApiError(400, message, param, "context_length_exceeded")

    def sampling(
        self, body: Sampling, prompts: list[list[int]], max_tokens: int | None, logprobs: int, grammar: Grammar | None
    ) -> SamplingParams:
        """max_tokens: limit of the request; None: the release's, else what the context leaves. Raises ApiError."""
        limit = self.context - max(map(len, prompts))
        try:
            default = min(self.max_answer_tokens or limit, limit)
            params = body.params(self.default_params, max_tokens or default, logprobs, grammar)
            params = replace(params, adapter=self.adapter(body.model))
            return params if max_tokens is None else replace(params, max_length=None)
        except UserError as e:
            raise ApiError(400, str(e)) from e

    async def generate(self, prompts: list[list[int]], params: SamplingParams, started: float) -> RequestHandle:
        """Submit prompts, and wait until the engine has accepted them → a handle, which must be closed.

        started: when the request arrived. Raises ApiError.
        """
        try:
            if params.grammar is not None:
                if len(params.grammar.text) > MAX_GRAMMAR_CHARACTERS:
                    most = MAX_GRAMMAR_CHARACTERS
                    raise ApiError(400, f"the schema or grammar has more than {most} characters; shorten it")
                compiled = await run_in_background(partial(self.engine.compile, params.grammar), "grammar")
                params = replace(params, grammar=compiled)
            thread = self.engine_thread
            handle = RequestHandle(prompts, params, started, self.options.timeout, self.metrics, thread.close)
            await thread.open(handle)
        except UserError as e:
            raise ApiError(400, str(e)) from e
        return handle

    async def score(self, prompt: list[int], top: int, started: float, adapter: str | None = None) -> PromptLogprobs:
        """A prompt's log-probabilities. Raises ApiError."""
        try:
            async with asyncio.timeout(self.seconds_left(started)):
                return await self.engine_thread.score(prompt, top, adapter)
        except TimeoutError:
            raise timed_out(self.options.timeout) from None
        except UserError as e:
            raise ApiError(400, str(e), "prompt") from e

    def seconds_left(self, started: float) -> float:
        """Seconds until the time-out of a request that arrived at `started`."""
        return max(0.0, started + self.options.timeout - time.monotonic())


def context_of(engine: Engine) -> int:
    """Tokens that a prompt and its answer may have: the model's context, or less if the KV cache holds less."""
    config = engine.model.config
    if engine.kv_cache_bytes is None:
        return config.max_position_embeddings
    blocks = engine.kv_cache_bytes // engine.block_bytes
    return min(config.max_position_embeddings, max(0, blocks - 2) * BLOCK)
