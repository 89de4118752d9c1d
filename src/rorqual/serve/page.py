"""The chat page at `/`, of gradio's parts: it keeps conversations in the browser and talks to the same worker."""

import hmac
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from rorqual.serve.errors import ApiError
from rorqual.serve.protocol import ChatRequest
from rorqual.serve.service import Service

MATHEMATICS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
STYLE = ".figures {font-size: .85em; opacity: .75; min-height: 1.4em} footer {display: none !important}"


def add_page(app: FastAPI, service: Service) -> FastAPI:
    """`app` with the page at its root."""
    import gradio as gr

    recommended, context = service.recommended, service.context

    async def reply(
        message: str, history: list[dict[str, Any]], system: str, temperature: float, top_p: float, max_tokens: float,
        budget: float | None, seed: float | None, key: str = "",
    ) -> AsyncIterator[tuple[list[dict[str, Any]], str]]:  # fmt: skip
        keys = service.options.keys
        known = [hmac.compare_digest(key.strip().encode(), k.encode()) for k in keys]  # all of them, in constant time
        if keys and not any(known):
            raise gr.Error("This server wants an API key; write it under Settings.", print_exception=False)
        said = [{"role": "system", "content": system}] if system.strip() else []
        # What was thought is not said again (R1's chat template drops it too).
        said += [{"role": m["role"], "content": plain(m["content"])} for m in history if not titled(m)]
        body = ChatRequest(
            messages=[*said, {"role": "user", "content": message}],  # type: ignore[list-item]
            temperature=temperature, top_p=top_p, max_tokens=int(max_tokens),
            thinking_budget=None if budget is None else int(budget), seed=None if seed is None else int(seed),
        )  # fmt: skip
        try:
            async for shown in answer(service, body):
                yield shown
        except ApiError as e:
            raise gr.Error(e.message, print_exception=False) from None

    figures = gr.Markdown(elem_classes="figures", render=False)
    settings = [
        gr.Textbox(label="System prompt", lines=2, render=False),
        gr.Slider(0, 2, recommended.temperature, step=0.05, label="Temperature", render=False),
        gr.Slider(0.05, 1, recommended.top_p, step=0.05, label="Top-p", render=False),
        gr.Slider(
            1, context, min(recommended.max_tokens, context), step=1, label="Longest answer, tokens", render=False
        ),
        gr.Number(None, label="Thinking budget, tokens (empty: none)", precision=0, minimum=0, render=False),
        gr.Number(None, label="Seed (empty: another each time)", precision=0, render=False),
    ]
    if service.options.keys:
        settings.append(gr.Textbox(label="API key", type="password", render=False))
    chatbot = gr.Chatbot(
        height="68vh", placeholder=f"**{service.options.name}**", latex_delimiters=MATHEMATICS, render=False,
        buttons=["copy"],
    )  # fmt: skip
    with gr.Blocks(title=f"{service.options.name} · Rorqual", analytics_enabled=False) as page:
        gr.ChatInterface(
            reply,
            chatbot=chatbot,
            editable=True,
            save_history=True,
            additional_inputs=settings,
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            additional_outputs=[figures],
            flagging_mode="never",
            concurrency_limit=None,
            api_visibility="private",
        )
        figures.render()
    page.queue(max_size=service.options.waiting or None)
    return gr.mount_gradio_app(app, page, path="/", footer_links=[], css=STYLE, theme=gr.themes.Soft())


async def answer(service: Service, body: ChatRequest) -> AsyncIterator[tuple[list[dict[str, Any]], str]]:
    """A reply as it grows, thoughts in a fold, with a line of figures under it."""
    started = time.monotonic()
    prompt = await service.chat_prompt(body.messages, None)
    service.check_prompt(prompt, "the conversation", None)
    params = service.sampling(body, body.max_tokens, 0, None)
    thought = said = ""
    tokens = reasoning_tokens = 0
    first = closed = None
    async with service.running([prompt], params, raw=False) as ticket:
        async for piece in service.pieces(ticket, started):
            now = time.monotonic()
            first = first or now
            thought, said = thought + piece.reasoning, said + piece.content
            tokens, reasoning_tokens = tokens + len(piece.tokens), piece.reasoning_tokens
            done = bool(said) or piece.finish is not None
            closed = closed or (now if done else None)
            shown: list[dict[str, Any]] = []
            if thought.strip():
                took = (closed or now) - started
                title = f"{'Thought' if done else 'Thinking'} · {took:.1f} s · {reasoning_tokens} tokens"
                status = {"title": title, "status": "done" if done else "pending"}
                shown.append({"role": "assistant", "content": thought, "metadata": status})
            if said or not shown:
                shown.append({"role": "assistant", "content": said})
            speed = (tokens - 1) / (now - first) if now > first else 0.0
            figures = (
                f"{tokens} tokens · {speed:.1f} tokens/s · first after {first - started:.2f} s · "
                f"{ticket.cached} of {len(prompt)} prompt tokens from the cache"
            )
            yield shown, figures


def titled(message: dict[str, Any]) -> bool:
    """Whether it is a fold."""
    return bool((message.get("metadata") or {}).get("title"))


def plain(content: Any) -> str:
    """A message's text; gradio hands it over as a text or in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
