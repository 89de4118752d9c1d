"""The routes. A request goes: guard → checked body → prompt tokens → Worker.open → pieces → answer or chunks."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from rorqual.engine import SamplingParams
from rorqual.engine.grammar import json_grammar
from rorqual.engine.score import score
from rorqual.errors import UserError
from rorqual.serve.answers import ChatChoice, Head, TextChoice, Usage
from rorqual.serve.errors import ApiError, on_api_error, on_http, on_invalid
from rorqual.serve.guard import Guard
from rorqual.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    ToolChoice,
)
from rorqual.serve.service import Service
from rorqual.serve.sse import EventStream, unless_gone
from rorqual.serve.tools import CallReader, forced, marker_of
from rorqual.serve.worker import Ticket


def build_app(service: Service) -> FastAPI:
    """The application; `service.worker` runs while it does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="Rorqual", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    options = service.options

    def counted(scope: dict[str, Any], status: int) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"  # a client's own words would make figures without end
        service.metrics.requests.labels(path, str(status or 499)).inc()

    app.add_middleware(Guard, keys=options.keys, max_body=options.max_body, counted=counted)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        started = time.monotonic()
        service.check_model(body.model)
        tools = body.tools if body.tool_choice != "none" else None
        prompt = await service.chat_prompt(body.messages, tools, extra=body.chat_template_kwargs)
        wanted = body.max_completion_tokens or body.max_tokens
        service.check_prompt(prompt, "messages", wanted)
        grammar = forced(body) or response_grammar(body)
        top = max(body.top_logprobs, int(body.logprobs and body.top_logprobs > 0))
        params = service.sampling(body, wanted, top if body.logprobs else 0, grammar)
        must = body.tool_choice == "required" or isinstance(body.tool_choice, ToolChoice)

        def choice(index: int) -> ChatChoice:
            reader = CallReader(marker_of(service.template), must) if tools else None
            return ChatChoice(index, service.vocabulary, reader, body.logprobs, top)

        head = Head("chat.completion", options.name, "chatcmpl")
        choices = [choice(i) for i in range(params.n)]
        return await answer(service, request, body, head, choices, [prompt], params, started, raw=False)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        started = time.monotonic()
        service.check_model(body.model)
        given = body.prompts()
        if not given:
            raise ApiError(400, "prompt is empty; give at least one token", "prompt")
        prompts = [await service.encode(p) if isinstance(p, str) else p for p in given]
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 makes sense only with echo", "max_tokens")
        for prompt in prompts:
            service.check_prompt(prompt, "prompt", body.max_tokens)
        params = service.sampling(body, body.max_tokens, body.logprobs or 0, None)
        choices = []
        for i, prompt in enumerate(prompts):
            echo = service.engine.tokenizer.decode(prompt) if body.echo else ""
            made = [TextChoice(i * params.n + j, service.vocabulary, body.logprobs, echo) for j in range(params.n)]
            if body.echo and body.logprobs is not None:
                try:
                    found = await service.worker.ask(lambda e, p=prompt: score(e.model, p, body.logprobs or 0))
                except UserError as e:
                    raise ApiError(400, str(e), "prompt") from e
                for c in made:
                    c.prompt(prompt, *found)
            choices += made
        head = Head("text_completion", options.name, "cmpl")
        if body.max_tokens == 0:
            for c in choices:
                c.text, c.finish = c.echo, "length"
            return JSONResponse(head.wrap([c.whole() for c in choices], Usage(sum(map(len, prompts))), chunk=False))
        return await answer(service, request, body, head, choices, prompts, params, started, raw=True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_card(service)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if body.prompt is not None:
            tokens = await service.encode(body.prompt)
        else:
            tokens = await service.chat_prompt(body.messages or [], body.tools, body.add_generation_prompt)
        return {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        size = service.engine.model.config.vocab_size
        if not all(0 <= t < size for t in body.tokens):
            raise ApiError(400, f"tokens: ids must be from 0 to {size - 1}", "tokens")
        return {"prompt": service.engine.tokenizer.decode(body.tokens)}

    @app.get("/health")
    async def health() -> Response:
        well = service.worker.alive
        return JSONResponse({"status": "ok" if well else "the engine has stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def response_grammar(body: ChatRequest) -> Any:
    """What response_format asks for."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    return json_grammar(schema if isinstance(schema, dict) else None)


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.options.name,
        "object": "model",
        "created": 0,
        "owned_by": "rorqual",
        "max_model_len": service.context,
    }


async def answer(
    service: Service, request: Request, body: Sampling, head: Head, choices: list[Any], prompts: list[list[int]],
    params: SamplingParams, started: float, raw: bool,
) -> Response:  # fmt: skip
    """Run it, and answer whole or in chunks; a client that goes away takes its request along."""
    usage = Usage(sum(map(len, prompts)))

    def counted(ticket: Ticket) -> Usage:
        usage.cached = ticket.cached
        usage.made = sum(c.tokens for c in choices)
        usage.reasoning = sum(c.reasoning_tokens for c in choices)
        return usage

    if not body.stream:

        async def whole() -> Response:
            async with service.running(prompts, params, raw) as ticket:
                async for piece in service.pieces(ticket, started):
                    choices[piece.index].take(piece)
            return JSONResponse(head.wrap([c.whole() for c in choices], counted(ticket), chunk=False))

        return await unless_gone(request.receive, whole())

    ticket = await unless_gone(request.receive, service.admit(prompts, params, raw))
    if isinstance(ticket, Response):  # nobody is there any more
        return ticket
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def chunks() -> AsyncIterator[str]:
        def event(shown: list[dict[str, Any]], usage: Usage | None = None) -> str:
            return json.dumps(head.wrap(shown, usage, chunk=True), ensure_ascii=False)

        try:
            if not raw:
                yield event([c.first() for c in choices])
            async for piece in service.pieces(ticket, started):
                if (shown := choices[piece.index].take(piece)) is not None:
                    yield event([shown])
            if with_usage:
                yield event([], counted(ticket))
        except ApiError as e:
            yield json.dumps(e.body())
        yield "[DONE]"

    return EventStream(chunks(), lambda: service.worker.close(ticket))
