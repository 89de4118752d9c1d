"""Models in a terminal: one continuation, or a conversation with thoughts dimmed and Markdown rendered as it comes."""

import contextlib
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

from rorqual.data.chat_template import ChatTemplate
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.unicode_checks import whole

REFRESH = 0.05  # seconds between two pictures of a block that grows: rendering Markdown for every token costs more
LINES = 1000  # of questions to remember


def loading(model: Path) -> Status:
    """Says so meanwhile, where somebody looks: packing weights takes a while."""
    return Console(stderr=True).status(f"loading {model}")


# -- one continuation


def read_prompt(prompt: str) -> str:
    """The prompt; `-` stands for standard input. Raises UserError for an empty one, or one that is not text."""
    if prompt != "-":
        if not whole(prompt):  # as Python has them from arguments
            raise UserError("the prompt is not UTF-8 text; convert it, or give it on standard input as UTF-8")
        return prompt
    try:
        said = sys.stdin.read()
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not UTF-8 text (byte {e.start}); convert it") from None
    if not whole(said):  # in the C locale, bytes that are no UTF-8 come so
        raise UserError("standard input is not UTF-8 text; convert it")
    if not said.strip():
        raise UserError("standard input is empty; give a prompt there, or as an argument")
    return said


def timed(engine: Engine, prompt: str | list[int], params: SamplingParams) -> dict[str, Any]:
    """One continuation, and how long it took."""
    started = time.monotonic()
    request = engine.submit(prompt, params)
    (sample,) = request.sequences
    first = None
    while sample.finish_reason is None:
        engine.step()
        if first is None and sample.tokens:
            first = time.monotonic()
    ended = time.monotonic()
    found = engine.completion(sample)
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
        "guesses": counts.draft_tokens,
        "guesses_right": counts.accepted_tokens,
    }


def templated(engine: Engine, messages: list[dict[str, str]]) -> str:
    """A conversation in the model's own words. Raises UserError where it has none for it."""
    if getattr(engine.tokenizer, "chat_template", None) is None:
        raise UserError("this model has no chat template (chat_template.jinja); use `rorqual generate --raw`")
    return ChatTemplate(engine.tokenizer).render(messages)


# -- a conversation


def talk(engine: Engine, params: SamplingParams, system: str | None = None) -> None:
    """Ask and answer until the input ends. Raises UserError for a system's message that is not text."""
    if not whole(system or ""):
        raise UserError("--system is not UTF-8 text; convert it")
    console = Console(highlight=False)
    console.print("Ctrl-C stops a reply, Ctrl-D ends.", style="dim")
    beginning = [] if system is None else [{"role": "system", "content": system}]
    said = list(beginning)
    for question in questions():
        said.append({"role": "user", "content": question})
        try:
            content = reply(engine, said, params, console)
        except UserError as e:  # e.g. the conversation no longer fits the context
            console.print(f"{e} — the conversation starts afresh", style="red", markup=False)
            said = list(beginning)
            continue
        if content:
            said.append({"role": "assistant", "content": content})
        else:  # stopped before it had said anything: as if it had not been asked
            said.pop()


def questions() -> Iterator[str]:
    """What is typed at the prompt, pasted lines in one; Ctrl-C gives a line up, Ctrl-D ends."""
    remember = _history() if sys.stdin.isatty() else lambda: None
    while True:
        try:
            # Half characters, as from a paste in another encoding, are nothing a tokenizer could read.
            question = input("> ").strip().encode(errors="replace").decode()
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
    """Give `input` line editing, and the questions of earlier sessions; returns what keeps the newest."""
    try:
        import readline
    except ImportError:  # not on Windows
        return lambda: None
    if "libedit" not in (readline.__doc__ or ""):  # Python turns it off; without, every pasted line is a question
        readline.parse_and_bind("set enable-bracketed-paste on")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "rorqual" / "questions"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        readline.read_history_file(path)
    except OSError:  # a home that cannot be written to is no reason not to talk
        return lambda: None
    readline.set_history_length(LINES)

    def remember() -> None:
        with contextlib.suppress(OSError):
            readline.append_history_file(1, path)

    return remember


def reply(engine: Engine, messages: list[dict[str, str]], params: SamplingParams, console: Console) -> str:
    """Print a reply as it comes, and what it took; gives its text without the thoughts."""
    started = time.monotonic()
    request = engine.submit(engine.encode(templated(engine, messages), begin=False), replace(params, n=1))
    (sample,) = request.sequences
    text = engine.detokenizer(sample)
    first = closed = None
    screen = Screen(console)
    with stoppable() as stopped, screen:
        try:
            while sample.finish_reason is None and not stopped:
                engine.step()
                now = time.monotonic()
                first = first or (now if sample.tokens else None)
                if closed is None and text.reasoning_tokens and not text.thinking:
                    closed = now
                    screen.thought(text.reasoning, f"thought for {closed - started:.1f} s")
                screen.show(text.reasoning, text.content)
        finally:
            engine.cancel(request)
    ended = time.monotonic()
    if stopped:
        console.print("[stopped]", style="yellow", markup=False)
    made = len(sample.tokens)
    figures = [f"{made} tokens" + (f", {text.reasoning_tokens} of them thoughts" if text.reasoning_tokens else "")]
    if first is not None and made > 1:
        figures.append(f"{(made - 1) / (ended - first):.1f} tokens/s, the first after {first - started:.2f} s")
    figures.append(f"{request.cached_tokens} of {len(request.prompt)} prompt tokens from the cache")
    console.print(" · ".join(figures), style="dim")
    return text.content


@contextlib.contextmanager
def stoppable() -> Iterator[list[bool]]:
    """Ctrl-C fills the list: an exception in the middle of a step would leave the engine half way."""
    stopped: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class Screen:
    """A reply as it grows: what can no longer change is printed for good, the last block is drawn again and again.

    Where the output is no terminal, text comes as it is.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._reasoning = self._content = ""
        self._thoughts = self._blocks = 0  # characters printed for good
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
        """The thoughts are complete."""
        self.show(reasoning, "")
        if self._thoughts:
            self.console.print(f"\n{words}\n", style="dim italic", markup=False)

    def show(self, reasoning: str, content: str) -> None:
        """All that is there of both so far."""
        self._reasoning, self._content = reasoning, content
        if len(reasoning) > self._thoughts:
            piece = reasoning[self._thoughts :]
            self.console.print(piece, end="", style="dim", markup=False, soft_wrap=True)
            self._thoughts = len(reasoning)
        rest = content[self._blocks :]
        if self.live is None:
            self.console.print(rest, end="", markup=False, soft_wrap=True)
            self._blocks = len(content)
        elif rest and time.monotonic() - self._drawn > REFRESH:
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
        # The end of what is higher than the screen: what has scrolled off it cannot be drawn again.
        lines = rest.splitlines()[-max(1, self.console.height - 4) :]
        self.live.update(markdown("\n".join(lines)), refresh=True)
        self._drawn = time.monotonic()

    def _print(self, blocks: str) -> None:
        if blocks.strip():
            self.console.print(markdown(blocks))


def markdown(text: str) -> Markdown:
    r"""Outside of code a backslash stands for itself, as does 3*4: models write \( and \frac, hardly ever \*."""
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=\w)\*(?=\w)", r"\\*", part.replace("\\", "\\\\")) for part in parts[::2]]
    return Markdown("".join(parts))


def complete_blocks(text: str) -> int:
    """Characters at the beginning that are whole blocks of Markdown, whatever may follow: they end with an empty line
    outside of code, after which something comes that is not indented.
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
