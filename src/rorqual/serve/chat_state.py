"""State of the chat page: the reply being generated, and the conversations that the browser stores."""

import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from rorqual.engine.outputs import TokenDelta
from rorqual.serve.api_errors import ApiError
from rorqual.serve.protocol import ChatRequest
from rorqual.serve.request_handle import RequestHandle
from rorqual.serve.service import ModelService

Message = dict[str, Any]  # gradio's: role, content, and metadata with a title where it is a fold
Conversation = dict[str, Any]  # id, messages

REFRESH_SECONDS = 0.05  # between two updates of a reply, each of which the browser renders
MAX_CONVERSATIONS = 50  # in a browser, whose storage is small


class Stopped(Exception):
    """Put among a handle's deltas, it ends the reply there."""


async def answer(
    service: ModelService, body: ChatRequest, opened: Callable[[RequestHandle], None] = lambda _: None
) -> AsyncIterator[tuple[list[Message], str]]:
    """Yield a reply as it is generated, thinking in a fold, and a line of figures; `opened` gets its handle."""
    started = time.monotonic()
    try:
        prompt = await service.chat_prompt(body.messages, [])
        service.check_prompt(prompt, "the conversation", None)
        max_tokens = min(body.max_tokens or service.context, service.context - len(prompt))
        params = service.sampling(body, [prompt], max_tokens, 0, None)
        with contextlib.closing(await service.generate([prompt], params, started)) as handle:
            opened(handle)
            reply = Reply(handle, len(prompt), started)
            try:
                async for delta in handle.deltas():
                    if reply.add(delta):
                        yield reply.messages(), reply.figures()
            except Stopped:
                reply.end("stopped")
                yield reply.messages(), reply.figures()
    except ApiError as e:
        yield [fold(f"⚠ {e.message}", "")], ""


class Reply:
    """A reply so far, and its timing."""

    def __init__(self, handle: RequestHandle, prompt: int, started: float) -> None:
        self.handle, self.prompt, self.started = handle, prompt, started
        self.reasoning = self.content = self.note = ""
        self.tokens = self.reasoning_tokens = 0
        self.first_token: float | None = None
        self.reasoning_end: float | None = None
        self.now = self.last_refresh = started

    def add(self, delta: TokenDelta) -> bool:
        """Add a delta → whether the page should be updated."""
        self.now = time.monotonic()
        self.first_token = self.first_token or self.now
        self.reasoning, self.content = self.reasoning + delta.reasoning, self.content + delta.content
        self.tokens, self.reasoning_tokens = self.tokens + len(delta.tokens), delta.reasoning_tokens
        if delta.finish_reason is not None:
            self.end("" if delta.finish_reason == "stop" else "cut off at the longest reply")
        elif self.content:
            self.reasoning_end = self.reasoning_end or self.now
        due = delta.finish_reason is not None or self.now - self.last_refresh >= REFRESH_SECONDS
        self.last_refresh = self.now if due else self.last_refresh
        return due

    def end(self, note: str) -> None:
        self.note, self.reasoning_end = note, self.reasoning_end or self.now

    def messages(self) -> list[Message]:
        shown = []
        if self.reasoning.strip():
            took = (self.reasoning_end or self.now) - self.started
            title = "Thinking" if self.reasoning_end is None else "Thought"
            title = f"{title} · {took:.1f} s · {self.reasoning_tokens} tokens"
            shown.append(fold(title, markdown(self.reasoning), "pending" if self.reasoning_end is None else "done"))
        if self.content or not shown or self.note:
            shown.append({"role": "assistant", "content": markdown(self.content)})
        return shown

    def figures(self) -> str:
        if self.first_token is None:
            return self.note
        speed = (self.tokens - 1) / (self.now - self.first_token) if self.now > self.first_token else 0.0
        found = [
            f"{self.tokens} tokens",
            f"{speed:.1f} tokens/s",
            f"first after {self.first_token - self.started:.2f} s",
            f"{self.handle.cached_tokens} of {self.prompt} prompt tokens from the cache",
        ]
        return " · ".join([*found, self.note] if self.note else found)


# Code, and formulas that are marked up already.
LITERAL = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\))", re.DOTALL)
# Pandoc's rule: no space inside next to a dollar sign, no digit behind the second. "$5 or $6" is money.
FORMULA = re.compile(r"(?<![\\$])\$(?![\s$])([^$\n]*[^\s$\\])\$(?![\d$])")
TIMES = re.compile(r"(?<=\w)\*(?=\w)")


def markdown(text: str) -> str:
    r"""A model's text as the page's Markdown: $…$ becomes \(…\), and the asterisk of 3*4 is escaped."""
    parts = LITERAL.split(text)
    parts[::2] = [FORMULA.sub(r"\\(\1\\)", part) for part in parts[::2]]
    parts = LITERAL.split("".join(parts))
    parts[::2] = [TIMES.sub(r"\\*", part) for part in parts[::2]]
    return "".join(parts)


def fold(title: str, content: str, status: str = "done") -> Message:
    return {"role": "assistant", "content": content, "metadata": {"title": title, "status": status}}


def is_fold(message: Message) -> bool:
    """Whether it is a fold."""
    return bool((message.get("metadata") or {}).get("title"))


def plain(content: Any) -> str:
    """A message's text; gradio passes a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def without_thinking(history: list[Message], system: str | None) -> list[Message]:
    """The messages for the model: without thinking, which R1's chat template drops too."""
    first = [{"role": "system", "content": system}] if (system or "").strip() else []
    answers = [m for m in history if not is_fold(m)]
    messages = [{"role": m["role"], "content": plain(m["content"]).replace("\\*", "*")} for m in answers]
    return first + [m for m in messages if m["content"] or m["role"] == "user"]


def until_question(history: list[Message], index: int) -> list[Message]:
    """A conversation up to the question that the message at `index` answers."""
    while index > 0 and history[index]["role"] != "user":
        index -= 1
    return history[: index + 1]


def save_conversation(
    conversations: list[Conversation] | None, current: str | None, history: list[Message]
) -> tuple[list[Conversation], str]:
    """The conversations, newest first, with the current one updated; and its id."""
    current = current or uuid.uuid4().hex
    others = [t for t in conversations or [] if t["id"] != current]
    return [{"id": current, "messages": history}, *others][:MAX_CONVERSATIONS], current


def titles(conversations: list[Conversation] | None) -> list[tuple[str, str]]:
    """Title and id of every conversation."""
    found = []
    for conversation in conversations or []:
        first = next((plain(m["content"]) for m in conversation["messages"] if m["role"] == "user"), "")
        line = " ".join(first.split())
        found.append((line if len(line) <= 40 else line[:39] + "…", conversation["id"]))
    return found
