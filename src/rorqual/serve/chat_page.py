"""The chat page at `/`, in gradio: conversations are stored in the browser, replies come from the same engine."""

import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from rorqual.extras import require
from rorqual.serve.api_errors import ApiError
from rorqual.serve.chat_state import (
    Conversation,
    Message,
    Stopped,
    answer,
    fold,
    save_conversation,
    titles,
    until_question,
    without_thinking,
)
from rorqual.serve.protocol import ChatRequest
from rorqual.serve.request_body import parse_body
from rorqual.serve.request_handle import RequestHandle
from rorqual.serve.service import ModelService

LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
STYLE = """
.figures {font-size: .85em; opacity: .75; min-height: 1.4em}
.conversations label {width: 100%}
.edit-textarea {width: 100% !important; min-height: 5em !important}
.message:has(.thought-group) + .message-buttons:not(:last-child) {display: none}
footer {display: none !important}
main {width: 100%; max-width: 64rem; margin: 0 auto}
"""
# The paths that the page needs. gradio serves more, uploads among them.
PATHS = (
    "/assets/", "/static/", "/theme.css", "/config", "/favicon.ico", "/manifest.json", "/gradio_api/heartbeat/",
    "/gradio_api/info", "/gradio_api/queue/", "/gradio_api/run/", "/gradio_api/startup-events", "/gradio_api/theme.css",
)  # fmt: skip


def add_page(app: FastAPI, service: ModelService) -> FastAPI:
    """`app` with the page at its root."""
    require("serve", "gradio")
    import gradio as gr
    from gradio.routes import App
    from gradio.themes import Default

    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    gr.mount_gradio_app(
        app, build_page(service), path="/", footer_links=[], run_history=False, css=STYLE,
        theme=Default(primary_hue="blue", font=font, font_mono=mono),
    )  # fmt: skip
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    inner = mount.app
    assert isinstance(inner, App)

    async def only_the_page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/" and not scope["path"].startswith(PATHS):
            await ApiError(404, "there is no such path").response()(scope, receive, send)
        else:
            await inner(scope, receive, send)

    mount.app = only_the_page
    app.state.leaving.append(inner.stop_event.set)  # every open page holds a connection
    return app


def build_page(service: ModelService) -> Any:
    """The page's layout and events."""
    import gradio as gr

    running: dict[str, RequestHandle] = {}  # by session

    async def reply(
        history: list[Message], system: str | None, temperature: float, top_p: float, longest: float,
        budget: float | None, seed: float | None, key: str, request: gr.Request,
    ) -> AsyncIterator[tuple[list[Message], str]]:  # fmt: skip
        known = [hmac.compare_digest((key or "").strip().encode(), k.encode()) for k in service.options.keys]
        if known and not any(known):
            yield [*history, fold("⚠ this server needs an API key; enter it under Settings, then try again", "")], ""
            return
        wanted = {
            "messages": without_thinking(history, system), "temperature": temperature, "top_p": top_p,
            "max_tokens": longest, "thinking_budget": budget, "seed": seed,
        }  # fmt: skip
        try:
            body = parse_body(json.dumps(wanted).encode(), ChatRequest)
        except ApiError as e:
            yield [*history, fold(f"⚠ {e.message}", "")], ""
            return
        session = request.session_hash or ""
        try:
            async for messages, line in answer(service, body, lambda handle: running.update({session: handle})):
                yield history + messages, line
        finally:
            running.pop(session, None)

    async def stop(request: gr.Request) -> None:
        if (handle := running.get(request.session_hash or "")) is not None:
            handle.put([Stopped()])

    def begun() -> tuple[Any, ...]:
        """A reply is running: show Stop, and disable what would start another."""
        still = gr.update(interactive=False)
        return gr.update(visible=False), gr.update(visible=True), still, still, ""

    def ask(text: str | None, history: list[Message]) -> tuple[str, list[Message]]:
        if not (text or "").strip():
            raise gr.Error("Write something first.", print_exception=False)
        return "", [*history, {"role": "user", "content": text}]

    def again(history: list[Message], which: gr.RetryData) -> list[Message]:
        return until_question(history, _message_index(which.index))

    def edited(history: list[Message], which: gr.EditData) -> list[Message]:
        return [*history[: _message_index(which.index)], {"role": "user", "content": which.value}]

    def keep(conversations: list[Conversation], current: str | None, history: list[Message]) -> tuple[Any, ...]:
        conversations, current = save_conversation(conversations, current, history)
        choices = gr.update(choices=titles(conversations), value=current, interactive=True)
        shown, hidden, enabled = gr.update(visible=True), gr.update(visible=False), gr.update(interactive=True)
        return conversations, current, choices, shown, hidden, enabled

    def choose(conversations: list[Conversation], wanted: str) -> tuple[str, list[Message], str]:
        return wanted, next((t["messages"] for t in conversations if t["id"] == wanted), []), ""

    def new() -> tuple[None, list[Message], Any, str]:
        return None, [], gr.update(value=None), ""

    def delete(conversations: list[Conversation], current: str | None) -> tuple[list[Conversation], None, Any, str]:
        conversations = [t for t in conversations if t["id"] != current]
        return conversations, None, gr.update(choices=titles(conversations), value=None), ""

    params, longest = service.default_params, service.context
    with gr.Blocks(
        title=f"{service.options.name} · Rorqual", analytics_enabled=False, fill_height=True, fill_width=True
    ) as page:
        # The secret is on the page anyway; a fixed one lets conversations outlive the server.
        store = gr.BrowserState([], storage_key="rorqual-conversations", secret="rorqual")
        current = gr.State(None)
        wide = gr.Checkbox(visible=False)
        with gr.Sidebar(width=300, open=False) as sidebar:
            begin = gr.Button("New conversation", variant="primary")
            chosen = gr.Radio([], label="Conversations", container=False, elem_classes="conversations")
            with gr.Accordion("Settings", open=False):
                settings = [
                    gr.Textbox("", label="System prompt", lines=2),
                    gr.Slider(0, 2, params.temperature, step=0.05, label="Temperature"),
                    gr.Slider(0.05, 1, params.top_p, step=0.05, label="Top-p"),
                    gr.Slider(1, longest, min(params.max_tokens, longest), step=1, label="Longest reply, tokens"),
                    gr.Number(None, label="Thinking budget, tokens (empty: none)", precision=0, minimum=0),
                    gr.Number(None, label="Seed (empty: another each time)", precision=0),
                    gr.Textbox("", label="API key", type="password", visible=bool(service.options.keys)),
                ]
        chatbot = gr.Chatbot(
            placeholder=f"## {service.options.name}", latex_delimiters=LATEX_DELIMITERS, editable="user",
            show_label=False, scale=1, buttons=["copy"], layout="panel",
        )  # fmt: skip
        with gr.Row():
            box = gr.Textbox(
                placeholder="Ask something", show_label=False, container=False, lines=1, max_lines=8, autofocus=True,
                scale=8,
            )  # fmt: skip
            send = gr.Button("Send", variant="primary", scale=1, min_width=80)
            halt = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)
        figures = gr.Markdown(elem_classes="figures")

        def then_reply(asked: Any) -> None:
            """Attach the reply to an event that adds a question."""
            on_its_way = asked.success(begun, None, [send, halt, chosen, begin, figures], queue=False)
            replied = on_its_way.success(
                reply, [chatbot, *settings], [chatbot, figures], concurrency_limit=None, show_progress="hidden"
            )
            after = [store, current, chosen, send, halt, begin]
            replied.then(keep, [store, current, chatbot], after, queue=False, show_progress="hidden")

        for trigger in (box.submit, send.click):
            then_reply(trigger(ask, [box, chatbot], [box, chatbot], queue=False, show_progress="hidden"))
        then_reply(chatbot.retry(again, chatbot, chatbot, queue=False, show_progress="hidden"))
        then_reply(chatbot.edit(edited, chatbot, chatbot, queue=False, show_progress="hidden"))
        halt.click(stop, queue=False)
        chosen.input(choose, [store, chosen], [current, chatbot, figures], queue=False, show_progress="hidden")
        begin.click(new, None, [current, chatbot, chosen, figures], queue=False, show_progress="hidden")
        chatbot.clear(delete, [store, current], [store, current, chosen, figures], queue=False, show_progress="hidden")
        page.load(None, None, wide, js="() => window.innerWidth > 768", queue=False).then(
            lambda wide: gr.update(open=wide), wide, sidebar, queue=False
        )
        page.load(lambda kept: gr.update(choices=titles(kept)), store, chosen, queue=False, show_progress="hidden")
    page.queue(max_size=service.options.max_queue or None)
    # By default it polls every millisecond even when idle, which took 3 % of a core from the engine.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = 0.02
    for dependency in page.fns.values():
        dependency.api_visibility = "private"
    return page


def _message_index(index: Any) -> int:
    """gradio gives a message's index alone, or with that of a part."""
    return index[0] if isinstance(index, (list, tuple)) else index
