"""Conversations on the page: a reply as it grows, and those that a browser keeps."""

import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from rorqual.serve.api_errors import ApiError
from rorqual.serve.engine_thread import RequestHandle
from rorqual.serve.protocol import ChatRequest
from rorqual.serve.service import ModelService

Message = dict[str, Any]  # as gradio has them: role, content, and metadata with a title where it is a fold
Talk = dict[str, Any]  # id, and messages

PICTURE = 0.05  # seconds between two pictures of a reply: the browser has to draw each
KEPT = 50  # conversations in a browser, whose storage is small


class Stopped(Exception):
    """Put among a ticket's pieces, it ends the reply there."""


async def answer(
    service: ModelService, body: ChatRequest, opened: Callable[[RequestHandle], None] = lambda _: None
) -> AsyncIterator[tuple[list[Message], str]]:
    """A reply as it grows, thoughts in a fold, with a line of figures; `opened` is told of its ticket."""
    started = time.monotonic()
    try:
        prompt = await service.chat_prompt(body.messages, [])
        service.check_prompt(prompt, "the conversation", None)
        most = min(body.max_tokens or service.context, service.context - len(prompt))
        params = service.sampling(body, [prompt], most, 0, None)
        async with service.running([prompt], params, raw=False) as ticket:
            opened(ticket)
            reply = Reply(ticket, len(prompt), started)
            try:
                async for piece in service.pieces(ticket, started):
                    if reply.take(piece):
                        yield reply.messages(), reply.figures()
            except Stopped:
                reply.end("stopped")
                yield reply.messages(), reply.figures()
    except ApiError as e:
        yield [fold(f"⚠ {e.message}", "")], ""


class Reply:
    """What has come of a reply, and when."""

    def __init__(self, ticket: RequestHandle, prompt: int, started: float) -> None:
        self.ticket, self.prompt, self.started = ticket, prompt, started
        self.thought = self.said = self.why = ""
        self.tokens = self.reasoning_tokens = 0
        self.first: float | None = None
        self.thought_until: float | None = None
        self.now = self.drawn = started

    def take(self, piece: Any) -> bool:
        """Whether it is time for a new picture."""
        self.now = time.monotonic()
        self.first = self.first or self.now
        self.thought, self.said = self.thought + piece.reasoning, self.said + piece.content
        self.tokens, self.reasoning_tokens = self.tokens + len(piece.tokens), piece.reasoning_tokens
        if piece.finish is not None:
            self.end("" if piece.finish == "stop" else "cut off at its longest")
        elif self.said:
            self.thought_until = self.thought_until or self.now
        due = piece.finish is not None or self.now - self.drawn >= PICTURE
        self.drawn = self.now if due else self.drawn
        return due

    def end(self, why: str) -> None:
        self.why, self.thought_until = why, self.thought_until or self.now

    def messages(self) -> list[Message]:
        shown = []
        if self.thought.strip():
            took = (self.thought_until or self.now) - self.started
            title = "Thinking" if self.thought_until is None else "Thought"
            title = f"{title} · {took:.1f} s · {self.reasoning_tokens} tokens"
            shown.append(fold(title, markdown(self.thought), "pending" if self.thought_until is None else "done"))
        if self.said or not shown or self.why:
            shown.append({"role": "assistant", "content": markdown(self.said)})
        return shown

    def figures(self) -> str:
        if self.first is None:
            return self.why
        speed = (self.tokens - 1) / (self.now - self.first) if self.now > self.first else 0.0
        found = [
            f"{self.tokens} tokens",
            f"{speed:.1f} tokens/s",
            f"first after {self.first - self.started:.2f} s",
            f"{self.ticket.cached} of {self.prompt} prompt tokens from the cache",
        ]
        return " · ".join([*found, self.why] if self.why else found)


# Code, and formulas that need no help.
LITERAL = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\))", re.DOTALL)
# Pandoc's rule: no space inside next to a dollar sign, no digit behind the second. "$5 or $6" is money.
FORMULA = re.compile(r"(?<![\\$])\$(?![\s$])([^$\n]*[^\s$\\])\$(?![\d$])")
TIMES = re.compile(r"(?<=\w)\*(?=\w)")


def markdown(text: str) -> str:
    r"""A model's words as the page's Markdown: $…$ becomes \(…\), and 3*4 stays what it is."""
    parts = LITERAL.split(text)
    parts[::2] = [FORMULA.sub(r"\\(\1\\)", part) for part in parts[::2]]
    parts = LITERAL.split("".join(parts))
    parts[::2] = [TIMES.sub(r"\\*", part) for part in parts[::2]]
    return "".join(parts)


def fold(title: str, content: str, status: str = "done") -> Message:
    return {"role": "assistant", "content": content, "metadata": {"title": title, "status": status}}


def titled(message: Message) -> bool:
    """Whether it is a fold."""
    return bool((message.get("metadata") or {}).get("title"))


def plain(content: Any) -> str:
    """A message's text; gradio hands it over as a text or in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def said(history: list[Message], system: str | None) -> list[Message]:
    """What a model is told: thoughts are not said again (R1's chat template drops them too)."""
    first = [{"role": "system", "content": system}] if (system or "").strip() else []
    spoken = [{"role": m["role"], "content": plain(m["content"]).replace("\\*", "*")} for m in history if not titled(m)]
    return first + [m for m in spoken if m["content"] or m["role"] == "user"]


def until_question(history: list[Message], index: int) -> list[Message]:
    """A conversation up to the question that the message at `index` answers."""
    while index > 0 and history[index]["role"] != "user":
        index -= 1
    return history[: index + 1]


def kept(talks: list[Talk] | None, current: str | None, history: list[Message]) -> tuple[list[Talk], str]:
    """The conversations, newest first, with the current one as it is now; and its id."""
    current = current or uuid.uuid4().hex
    others = [t for t in talks or [] if t["id"] != current]
    return [{"id": current, "messages": history}, *others][:KEPT], current


def titles(talks: list[Talk] | None) -> list[tuple[str, str]]:
    """A name and the id of every conversation."""
    found = []
    for talk in talks or []:
        first = next((plain(m["content"]) for m in talk["messages"] if m["role"] == "user"), "")
        line = " ".join(first.split())
        found.append((line if len(line) <= 40 else line[:39] + "…", talk["id"]))
    return found
