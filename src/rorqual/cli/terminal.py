"""Terminal interface: one completion, or a chat with dimmed thinking and Markdown rendered while it streams."""

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.status import Status
from rich.text import Text

from rorqual.data.chat_messages import Message
from rorqual.data.chat_template import ChatTemplate
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.unicode_checks import whole

REFRESH_SECONDS = 0.05  # between two renderings of a growing block; for every token Markdown would cost more
HISTORY_LINES = 1000  # of questions


def loading(model: Path) -> Status:
    """A status line while loading; quantising weights takes a while."""
    return Console(stderr=True).status(f"loading {model}")


# -- one completion


def read_prompt(prompt: str) -> str:
    """The prompt; `-` stands for standard input. Raises UserError for an empty one, or one that is not text."""
    if prompt != "-":
        if not whole(prompt):  # surrogates in arguments stand for bytes that are not UTF-8
            raise UserError("the prompt is not UTF-8 text; convert it, or give it on standard input as UTF-8")
        return prompt
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not UTF-8 text (byte {e.start}); convert it") from None
    if not whole(text):  # in the C locale, surrogates stand for bytes that are not UTF-8
        raise UserError("standard input is not UTF-8 text; convert it")
    if not text.strip():
        raise UserError("standard input is empty; give a prompt there, or as an argument")
    return text


def timed(engine: Engine, prompt: str | list[int], params: SamplingParams) -> dict[str, Any]:
    """One completion, with timings in seconds."""
    started = time.monotonic()
    request = engine.submit(prompt, params)
    (sequence,) = request.sequences
    first = None
    while sequence.finish_reason is None:
        engine.step()
        if first is None and sequence.tokens:
            first = time.monotonic()
    ended = time.monotonic()
    found = engine.completion(sequence)
    after_first = len(found.tokens) - 1
    counts = engine.status().counters
    return {
        "text": found.text,
        "tokens": found.tokens,
        "finish_reason": found.finish_reason,
        "prompt_tokens": len(request.prompt),
        "first_token_seconds": (first or ended) - started,
        "seconds": ended - started,
        "tokens_per_second": after_first / (ended - first) if first and after_first else None,
        "draft_tokens": counts.draft_tokens,
        "accepted_tokens": counts.accepted_tokens,
        "guesses": counts.draft_tokens,  # old names of the two above, until release 0.3
        "guesses_right": counts.accepted_tokens,
    }


def templated(engine: Engine, messages: list[Message]) -> str:
    """Messages rendered with the model's chat template. Raises UserError without one."""
    tokenizer = engine.require_tokenizer()
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("this model has no chat template (chat_template.jinja); use `rorqual generate --raw`")
    return ChatTemplate(tokenizer).render(messages)


# -- chat


def talk(engine: Engine, params: SamplingParams, system: str | None = None) -> None:
    """Chat until the input ends. Raises UserError for a system message that is not UTF-8."""
    if not whole(system or ""):
        raise UserError("--system is not UTF-8 text; convert it")
    console = Console(highlight=False)
    console.print("Ctrl-C stops a reply, Ctrl-D ends.", style="dim")
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    for question in questions():
        messages.append({"role": "user", "content": question})
        try:
            content = reply(engine, messages, params, console)
        except UserError as e:  # e.g. the conversation no longer fits the context
            console.print(f"{e} — starting a new conversation", style="red", markup=False)
            messages = list(beginning)
            continue
        if content:
            messages.append({"role": "assistant", "content": content})
        else:  # stopped before the answer began: drop the question
            messages.pop()


def questions() -> Iterator[str]:
    """Yield the questions typed, pasted lines as one; Ctrl-C discards a line, Ctrl-D ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8, as from a paste in another encoding
        sys.stdin.reconfigure(errors="replace")
    remember = _history() if sys.stdin.isatty() else lambda: None
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question:
            remember()
            yield question


def _history() -> Any:
    """Enable line editing and the history of earlier sessions; returns a function that saves the newest line."""
    try:
        import readline
    except ImportError:  # not on Windows
        return lambda: None
    if "libedit" not in (readline.__doc__ or ""):  # Python disables it; without it every pasted line is a question
        readline.parse_and_bind("set enable-bracketed-paste on")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "rorqual" / "questions"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        readline.read_history_file(path)
    except OSError:  # without a writable home there is no history
        return lambda: None
    readline.set_history_length(HISTORY_LINES)

    def remember() -> None:
        with contextlib.suppress(OSError):
            readline.append_history_file(1, path)

    return remember


def reply(engine: Engine, messages: list[Message], params: SamplingParams, console: Console) -> str:
    """Print a reply as it streams, then its figures → its text without the thinking."""
    started = time.monotonic()
    request = engine.submit(engine.encode(templated(engine, messages), begin=False), replace(params, n=1))
    (sequence,) = request.sequences
    text = engine.detokenizer(sequence)
    first = closed = None
    screen = Screen(console)
    with stoppable() as stopped, screen:
        try:
            while sequence.finish_reason is None and not stopped:
                engine.step()
                now = time.monotonic()
                first = first or (now if sequence.tokens else None)
                if closed is None and text.reasoning_tokens and not text.thinking:
                    closed = now
                    screen.thought(text.reasoning, f"thought for {closed - started:.1f} s")
                screen.show(text.reasoning, text.content)
        finally:
            engine.cancel(request)
    ended = time.monotonic()
    if stopped:
        console.print("[stopped]", style="yellow", markup=False)
    num_tokens = len(sequence.tokens)
    thoughts = f", {text.reasoning_tokens} of them thoughts" if text.reasoning_tokens else ""
    figures = [f"{num_tokens} tokens{thoughts}"]
    if first is not None and num_tokens > 1:
        figures.append(f"{(num_tokens - 1) / (ended - first):.1f} tokens/s, the first after {first - started:.2f} s")
    figures.append(f"{request.cached_tokens} of {len(request.prompt)} prompt tokens from the cache")
    console.print(" · ".join(figures), style="dim")
    return text.content


@contextlib.contextmanager
def stoppable() -> Iterator[list[bool]]:
    """Ctrl-C appends to the list; an exception within a step would leave the engine in an inconsistent state."""
    stopped: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class Screen:
    """Renders a streaming reply: complete Markdown blocks are printed once, the last block is redrawn as it grows.

    Without a terminal the text is printed as it is.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._reasoning = self._content = ""
        self._thoughts = self._blocks = 0  # characters printed
        self._drawn = 0.0

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thoughts and not self._content:
            self.console.print()
        if self.live is not None:
            self.live.stop()
            self._print(self._content[self._blocks :])
        elif self._content:
            self.console.print()

    def thought(self, reasoning: str, words: str) -> None:
        """The thinking is complete."""
        self.show(reasoning, "")
        if self._thoughts:
            self.console.print(f"\n{words}\n", style="dim italic", markup=False)

    def show(self, reasoning: str, content: str) -> None:
        """Update with the full text so far."""
        self._reasoning, self._content = reasoning, content
        if len(reasoning) > self._thoughts:
            piece = reasoning[self._thoughts :]
            self.console.print(piece, end="", style="dim", markup=False, soft_wrap=True)
            self._thoughts = len(reasoning)
        rest = content[self._blocks :]
        if self.live is None:
            self.console.print(rest, end="", markup=False, soft_wrap=True)
            self._blocks = len(content)
        elif rest and time.monotonic() - self._drawn > REFRESH_SECONDS:
            self._draw(rest)

    def _draw(self, rest: str) -> None:
        assert self.live is not None
        if not self.live.is_started:
            self.live.start()
        if complete := complete_blocks(rest):
            self.live.update(Text(""), refresh=True)
            self._print(rest[:complete])
            self.console.print()
            self._blocks += complete
            rest = rest[complete:]
        # Only the lines that fit the screen: what has scrolled off cannot be redrawn.
        lines = rest.splitlines()[-max(1, self.console.height - 4) :]
        self.live.update(markdown("\n".join(lines)), refresh=True)
        self._drawn = time.monotonic()

    def _print(self, blocks: str) -> None:
        if blocks.strip():
            self.console.print(markdown(blocks))


def markdown(text: str) -> Markdown:
    r"""Markdown with literal backslashes and asterisks as in 3*4 outside code: models write \( and \frac, rarely \*."""
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=\w)\*(?=\w)", r"\\*", part.replace("\\", "\\\\")) for part in parts[::2]]
    return Markdown("".join(parts))


def complete_blocks(text: str) -> int:
    """The length of the text's complete Markdown blocks: they end with an empty line outside code that is followed by
    an unindented line.
    """
    complete = at = 0
    fence, empty = "", False
    for line in text.splitlines(keepends=True):
        if not fence and empty and not line[0].isspace():
            complete = at
        empty = not line.strip()
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip().startswith(fence):
            fence = ""
        at += len(line)
    return complete
