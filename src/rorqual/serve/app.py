"""The routes: body checked → prompt tokens → ModelService.generate → RequestHandle.deltas → response or chunks."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from rorqual.data.call_reader import CallReader
from rorqual.data.tool_formats import JSON
from rorqual.engine import SamplingParams
from rorqual.serve import schemas
from rorqual.serve.api_errors import ApiError, on_api_error, on_bug, on_http
from rorqual.serve.background import kind_of, run_in_background
from rorqual.serve.middleware import AuthMiddleware
from rorqual.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from rorqual.serve.request_body import JsonRoute
from rorqual.serve.responses import ChatChoice, ResponseHeader, TextChoice, Usage
from rorqual.serve.service import ModelService
from rorqual.serve.sse import EventStream, cancel_on_disconnect
from rorqual.serve.tool_calls import call_grammar, callable_tools, must_call

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def build_app(service: ModelService) -> FastAPI:
    """The FastAPI application; its lifespan starts and stops the engine thread."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        await service.engine_thread.stop()

    options = service.options
    app = FastAPI(
        title="Rorqual", version=version("rorqual"), lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if options.keys else [],  # for OpenAPI; middleware checks
    )  # fmt: skip
    app.router.route_class = JsonRoute
    app.state.leaving = []  # callbacks that close long-lived connections on shutdown
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)

    def count_response(scope: Scope, status: int) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"  # unknown paths would add labels without limit
        service.metrics.requests.labels(path, str(status or 499)).inc()

    app.add_middleware(
        AuthMiddleware, keys=options.keys, host=options.host, origins=options.origins, max_body=options.max_body,
        timeout=options.timeout, count=count_response,
    )  # fmt: skip

    @app.post("/v1/chat/completions", responses=schemas.streamed(schemas.ChatAnswer))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Chat completion. Thinking is returned as `reasoning_content`, as in DeepSeek's API."""
        started = time.monotonic()
        service.check_model(body.model)
        service.check_count(body.n)
        tools = callable_tools(body)
        settings = template_kwargs(service, body)
        prompt = await service.chat_prompt(body.messages, tools, body.add_generation_prompt, body.unfinished, settings)
        max_tokens = body.max_completion_tokens or body.max_tokens
        service.check_prompt(prompt, "messages", max_tokens)
        grammar, call_format = body.form(), None
        if tools:
            form = service.chat.tool_support(True).format
            calls = call_grammar(body, form, service.marks, body.response_schema())
            if calls is not None and body.structured_outputs is not None:
                raise ApiError(
                    400, "structured_outputs: tools constrain the answer already; leave one of the two out",
                    "structured_outputs",
                )  # fmt: skip
            grammar = calls or grammar
            call_format = JSON if must_call(body) else form, {t.function.name for t in tools}, body.parallel_tool_calls
        params = service.sampling(body, [prompt], max_tokens, body.top_logprobs, grammar)

        def choice(index: int) -> ChatChoice:
            reader = None if call_format is None else CallReader(*call_format)
            return ChatChoice(index, service.vocabulary, reader, body.logprobs, body.top_logprobs)

        head = ResponseHeader("chat.completion", body.model or options.name, "chatcmpl")
        choices = [choice(i) for i in range(params.n)]
        return await answer(service, request, body, head, choices, [prompt], params, started)

    @app.post("/v1/completions", responses=schemas.streamed(schemas.TextAnswer))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete texts, or token ids, as they are."""
        started = time.monotonic()
        service.check_model(body.model)
        given = body.prompts()
        if not given:
            raise ApiError(400, "prompt is empty; give at least one token", "prompt")
        # The release's limit goes before OpenAI's default of 16.
        default = service.max_answer_tokens and "max_tokens" not in body.model_fields_set
        max_tokens = None if default else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 makes sense only with echo", "max_tokens")
        service.check_count(len(given) * body.n)
        prompts = [await service.encode(p, body.add_special_tokens) if isinstance(p, str) else p for p in given]
        for prompt in prompts:
            service.check_prompt(prompt, "prompt", max_tokens)
            service.check_tokens(prompt, "prompt")
        params = service.sampling(body, prompts, max_tokens, body.logprobs or 0, body.form())
        choices = []
        for i, prompt in enumerate(prompts):
            sent = given[i]
            echo = "" if not body.echo else sent if isinstance(sent, str) else await service.text(sent)
            own = [TextChoice(i * params.n + j, service.vocabulary, body.logprobs, echo) for j in range(params.n)]
            if body.echo and body.logprobs is not None:
                scored = service.score(prompt, body.logprobs, started, service.adapter(body.model))
                found = await cancel_on_disconnect(request.receive, scored)
                if isinstance(found, Response):  # the client has disconnected
                    return found
                for c in own:
                    await run_in_background(
                        partial(c.prompt, prompt, found.logprobs, found.ranked), kind_of(len(prompt))
                    )
            choices += own
        head = ResponseHeader("text_completion", body.model or options.name, "cmpl")
        if max_tokens == 0:
            return echoed(service, body, head, choices, Usage(sum(map(len, prompts))), started)
        return await answer(service, request, body, head, choices, prompts, params, started)

    @app.get("/v1/models", response_model=schemas.ModelList, responses=schemas.problems(401, 403))
    async def models() -> dict[str, object]:
        """The model served, and its adapters."""
        return {"object": "list", "data": [model_card(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}", response_model=schemas.ModelCard, responses=schemas.problems(400, 401, 403, 404))
    async def model(name: str) -> dict[str, object]:
        service.check_model(name)
        return model_card(service, name)

    bodies = schemas.problems(400, 401, 403, 404, 408, 413, 415)

    @app.post("/tokenize", response_model=schemas.Tokens, responses=bodies)
    async def tokenize(body: TokenizeRequest) -> dict[str, object]:
        """Token ids of a text or a conversation."""
        service.check_model(body.model)
        if body.prompt is not None:
            tokens = await service.encode(body.prompt, body.add_special_tokens is not False)
        else:
            messages = body.messages or []
            unfinished = body.continue_final_message or bool(messages and messages[-1].prefix)
            tokens = await service.chat_prompt(
                messages, body.tools or [], body.add_generation_prompt, unfinished, body.chat_template_kwargs
            )
        return {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}

    @app.post("/detokenize", response_model=schemas.Text, responses=bodies)
    async def detokenize(body: DetokenizeRequest) -> dict[str, object]:
        """The text of token ids."""
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return {"prompt": await service.decode(body.tokens)}

    @app.get(
        "/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}} | schemas.problems(403)
    )
    async def health() -> Response:
        """Whether the engine runs; needs no key."""
        alive = service.engine_thread.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=schemas.problems(401, 403))
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/v1/{rest:path}", methods=METHODS, include_in_schema=False)
    async def unknown_path(request: Request) -> None:
        """Unknown paths and methods; registered before the chat page, which is mounted at the root."""
        known = [r for r in app.routes if r.matches(request.scope)[0] is Match.PARTIAL]
        methods = sorted({method for route in known for method in getattr(route, "methods", ())})
        if methods:
            raise ApiError(405, f"this path takes {', '.join(methods)}", Allow=", ".join(methods))
        raise ApiError(404, "there is no such path; /openapi.json lists those there are")

    return app


def echoed(
    service: ModelService, body: Sampling, head: ResponseHeader, choices: list[TextChoice], usage: Usage, started: float
) -> Response:
    """The response to max_tokens 0 with echo: prompts alone, whole or as a stream."""
    if not body.stream:
        return JSONResponse(head.whole([c.echoed() for c in choices], usage))

    async def chunks() -> AsyncIterator[str]:
        for c in choices:
            yield head.chunk([c.echoed()])
        if body.stream_options is not None and body.stream_options.include_usage:
            yield head.chunk([], usage)
        yield "[DONE]"

    return EventStream(chunks(), service.seconds_left(started), lambda: None)


def template_kwargs(service: ModelService, body: ChatRequest) -> dict[str, Any]:
    """Arguments of the chat template besides messages and tools."""
    effort = body.reasoning_effort
    if effort is None or "reasoning_effort" in body.chat_template_kwargs:
        return body.chat_template_kwargs
    if "reasoning_effort" in service.template:
        return body.chat_template_kwargs | {"reasoning_effort": effort}
    if effort != "medium":  # OpenAI's default
        name = "reasoning_effort"
        raise ApiError(400, f"{name}: this model's template does not read it; send thinking_budget", name)
    return body.chat_template_kwargs


def model_card(service: ModelService, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "rorqual",
        "max_model_len": service.context,
    }


async def answer(
    service: ModelService, request: Request, body: Sampling, head: ResponseHeader,
    choices: list[ChatChoice] | list[TextChoice], prompts: list[list[int]], params: SamplingParams, started: float,
) -> Response:  # fmt: skip
    """Run the request and respond whole or in chunks; a client that disconnects cancels its request."""
    if not body.stream:

        async def whole() -> Response:
            with contextlib.closing(await service.generate(prompts, params, started)) as handle:
                async for delta in handle.deltas():
                    choices[delta.index].add(delta)
            return JSONResponse(head.whole([c.whole() for c in choices], Usage.of(handle.requests)))

        return await cancel_on_disconnect(request.receive, whole())

    handle = await cancel_on_disconnect(request.receive, service.generate(prompts, params, started))
    if isinstance(handle, Response):  # the client has disconnected
        return handle
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def chunks() -> AsyncIterator[str]:
        try:
            if roles := [c.first() for c in choices if isinstance(c, ChatChoice)]:
                yield head.chunk(roles)
            async for delta in handle.deltas():
                if (shown := choices[delta.index].add(delta)) is not None:
                    yield head.chunk([shown])
            if with_usage:
                yield head.chunk([], Usage.of(handle.requests))
        except ApiError as e:
            yield json.dumps(e.body())
        yield "[DONE]"

    return EventStream(chunks(), service.seconds_left(started), handle.close)
